"""WindowCache gives attention the rows that mlx-lm's rotating cache would hold, and takes back what a pass added."""

from __future__ import annotations

import copy
from typing import Any
from unittest import mock

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mlx_lm.models.cache import RotatingKVCache

from mtp_mlx.model import block_attention, window_cache
from mtp_mlx.model.block import Block, block_shape
from mtp_mlx.model.cache import BlockCache
from mtp_mlx.model.rows import RowContext
from mtp_mlx.model.window_cache import WindowCache

WINDOW = 5


def rows(first: int, count: int) -> mx.array:
    """[1, 2, count, 3] keys that say where they stand."""
    positions = mx.arange(first, first + count, dtype=mx.float32)[:, None]
    return mx.broadcast_to(positions, (1, 2, count, 3)) + mx.array(
        [
            [[[0.0, 0.25, 0.5]]],
        ]
    )


def positions(keys: mx.array) -> list[int]:
    """Where the rows of `rows` stand."""
    return [int(value) for value in np.array(keys)[0, 0, :, 0]]


def feed(cache: Any, count: int) -> list[int]:
    """Runs a pass; returns the positions it is given."""
    first = int(cache.offset)
    keys, values = cache.update_and_fetch(rows(first, count), -rows(first, count))
    np.testing.assert_array_equal(np.array(keys), -np.array(values))
    return positions(keys)


@settings(max_examples=150, deadline=None, derandomize=True, database=None)
@given(
    st.lists(st.tuples(st.integers(1, 9), st.integers(0, 9)), max_size=14),
    st.integers(1, 7),
    st.integers(0, 14),
)
def test_a_pass_sees_its_window_whatever_was_taken_back(
    passes: list[tuple[int, int]], window: int, already: int
) -> None:
    """Against a list of positions; `already` rows were read by mlx-lm's own cache one by one, which rotates it."""
    inner = RotatingKVCache(window)
    for _ in range(already):
        feed(inner, 1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(window_cache, "ROOM", 4)
        cache, length = WindowCache(inner), already
        for count, kept in passes:
            kept = min(count, kept)
            expected = list(range(max(0, length - window + 1), length + count))
            assert feed(cache, count) == expected
            assert cache.trim(count - kept) == count - kept
            length += kept
            assert cache.offset == length and cache.history == min(length, window - 1)
    theirs, ours = cache.hand_back(), WindowCache(copy.deepcopy(cache.inner))
    assert theirs is inner and theirs.offset == length
    for count in (1, 1, 3, 1):
        expected = list(range(max(0, length - window + 1), length + count))
        assert sorted(feed(theirs, count)) == expected
        assert feed(ours, count) == expected
        length += count


def seen_by_exact_rows(cache: BlockCache, context: RowContext, block: Block) -> list[list[int]]:
    """The keys of every attention call of a pass over `block`, by position, in their order."""
    calls: list[list[int]] = []

    def record(queries: mx.array, keys: mx.array, values: mx.array, **_: Any) -> mx.array:
        calls.append(positions(keys))
        return queries

    count = block.ids.shape[1]
    with context.running(block), mock.patch.object(block_attention.base, block_attention.NAME, record):
        mask = cache.make_mask(count)
        own = rows(int(cache.offset), count)
        keys, values = cache.update_and_fetch(own, -own)
        block_attention.scaled_dot_product_attention(own, keys, values, cache, 1.0, mask)
    return calls


@settings(max_examples=150, deadline=None, derandomize=True, database=None)
@given(
    st.lists(st.tuples(st.booleans(), st.integers(1, 6), st.integers(1, 6)), max_size=12),
    st.integers(1, 7),
    st.integers(0, 16),
)
def test_exact_rows_see_their_window_in_the_order_of_mlx_lm(
    passes: list[tuple[bool, int, int]], window: int, already: int
) -> None:
    """(step or prompt, rows, rows kept of a step), after a prompt of `already` rows; also after handing back."""
    theirs, context = RotatingKVCache(window), RowContext(exact=True)
    if already:
        feed(theirs, already)
    for is_step, count, kept in passes:
        cache = BlockCache(WindowCache(copy.deepcopy(theirs)), context)
        for step in (is_step, True):  # the second goes on without handing back
            if step:
                ids = mx.zeros((count,), dtype=mx.int32)
                block = Block.decode(ids, block_shape(count - 1, (0,) * count), int(cache.offset), 100)
                calls, kept = seen_by_exact_rows(cache, context, block), min(kept, count)
                for call in calls[:kept]:
                    assert call == feed(theirs, 1)
                cache.trim(count - kept)
            else:
                calls = seen_by_exact_rows(cache, context, Block.real(mx.zeros((1, count), dtype=mx.int32)))
                assert calls == [feed(theirs, count)]
        handed = cache.inner.hand_back()
        assert feed(copy.deepcopy(handed), 1) == feed(copy.deepcopy(theirs), 1)
        assert feed(copy.deepcopy(handed), 2) == feed(copy.deepcopy(theirs), 2)


def naive_mask(offset: int, offsets: np.ndarray, sees: np.ndarray, window: int) -> np.ndarray:
    """[N, history + N] by the definition: a row sees what its block says, if less than a window before it."""
    history = min(offset, WINDOW - 1)
    where = [*range(offset - history, offset), *(offset + offsets)]
    mask = np.zeros((len(offsets), len(where)), dtype=bool)
    for row, own in enumerate(offset + offsets):
        for column, place in enumerate(where):
            visible = column < history or sees[row, column - history]
            mask[row, column] = visible and own - place < window
    return mask


@pytest.mark.parametrize("offset", [0, 2, 4, 5, 17])
@pytest.mark.parametrize("window_size", [None, WINDOW, 3, WINDOW + 1])
@pytest.mark.parametrize(
    ("drafts", "slots"), [(0, (0,)), (3, (0,) * 4), (2, (2, 1, 3)), (6, (0,) * 7), (0, (7,))]
)
def test_masks_of_blocks(offset: int, window_size: int | None, drafts: int, slots: tuple[int, ...]) -> None:
    context, shape = RowContext(), block_shape(drafts, slots)
    inner = RotatingKVCache(WINDOW)
    cache = BlockCache(WindowCache(inner), context)
    if offset:
        feed(cache, offset)
    tokens = mx.zeros((shape.n_real,), dtype=mx.int32)
    with context.running(Block.decode(tokens, shape, offset, 100)):
        found = cache.make_mask(shape.rows, window_size=window_size)
    expected = naive_mask(offset, shape.offsets, shape.visibility, min(window_size or WINDOW, WINDOW))
    if found is None:
        assert expected.all()
    elif isinstance(found, str):
        history = min(offset, WINDOW - 1)
        np.testing.assert_array_equal(expected, np.tril(np.ones_like(expected), history))
    else:
        np.testing.assert_array_equal(np.broadcast_to(np.array(found), expected.shape), expected)


def test_prompts_get_the_masks_of_mlx_lm() -> None:
    """Chunks of a prompt are no steps: whatever mlx-lm lets their rows see, they see."""
    for already in (0, 3, 9):
        theirs = RotatingKVCache(WINDOW)
        if already:
            feed(theirs, already)
        ours = BlockCache(WindowCache(copy.deepcopy(theirs)), RowContext())
        for count in (2, 4, 9):
            for size in (None, WINDOW, WINDOW + 1, 3):
                one, other = (
                    theirs.make_mask(count, window_size=size),
                    ours.make_mask(count, window_size=size),
                )
                assert one == other if isinstance(one, str) else mx.array_equal(one, other)


def test_rows_before_the_newest_pass_stay() -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(window_cache, "ROOM", 1)
        cache = WindowCache(RotatingKVCache(WINDOW))
        for _ in range(20):
            feed(cache, 1)
    with pytest.raises(ValueError, match="a window of 5 cannot remove 15 rows"):
        cache.trim(15)
    assert cache.offset == 20


def test_a_long_prompt_does_not_stay() -> None:
    """Its rows leave with the first passes after it, as from mlx-lm's cache."""
    cache = WindowCache(RotatingKVCache(WINDOW))
    feed(cache, 2000)
    assert cache.nbytes > 2000 * 2 * 3 * 4 * 2
    feed(cache, 1)
    assert cache.nbytes <= (WINDOW + 3 * window_cache.ROOM) * 2 * 3 * 4 * 2
