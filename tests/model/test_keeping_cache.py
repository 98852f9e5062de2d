"""KeepingCache gives attention the rows that mlx-lm's rotating cache with first rows that stay would hold, and takes
back what a pass added; prompts are read exactly as mlx-lm reads them."""

from __future__ import annotations

import copy
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mlx_lm.models.cache import RotatingKVCache

from mtp_mlx.errors import MTPError
from mtp_mlx.model import window_cache
from mtp_mlx.model.block import Block, block_shape
from mtp_mlx.model.cache import BlockCache
from mtp_mlx.model.keeping_cache import KeepingCache
from mtp_mlx.model.rows import RowContext
from tests.model.test_window_cache import feed, positions, rows

KEEP = 4


def seen(cache: BlockCache, block: Block) -> list[list[int]]:
    """For each row of a pass the positions that it sees."""
    count, context = block.ids.shape[-1], cache.rows
    with context.running(block):
        mask = cache.make_mask(count)
        own = rows(int(cache.offset), count)
        keys = cache.update_and_fetch(own, -own)[0]
    where = positions(keys)
    if mask is None:
        sees = np.ones((count, len(where)), dtype=bool)
    elif isinstance(mask, str):
        sees = np.tril(np.ones((count, len(where)), dtype=bool), len(where) - count)
    else:
        sees = np.array(mask)
    assert sees.shape == (count, len(where))
    return [[place for place, visible in zip(where, row, strict=True) if visible] for row in sees]


def step(cache: BlockCache, count: int) -> Block:
    ids = mx.zeros((count,), dtype=mx.int32)
    return Block.decode(ids, block_shape(count - 1, (0,) * count), int(cache.offset), 100)


@settings(max_examples=200, deadline=None, derandomize=True, database=None)
@given(
    st.lists(st.tuples(st.booleans(), st.integers(1, 9), st.integers(1, 9)), max_size=12),
    st.integers(5, 14),
    st.integers(0, 30),
    st.booleans(),
)
def test_every_row_sees_what_it_would_see_in_mlx_lm(
    passes: list[tuple[bool, int, int]], size: int, already: int, again: bool
) -> None:
    """(step or prompt, rows, rows kept of a step), after a prompt of `already` rows; `again`: handed back between."""
    theirs, context = RotatingKVCache(size, keep=KEEP), RowContext()
    if already:
        feed(theirs, already)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(window_cache, "ROOM", 4)
        cache = BlockCache(KeepingCache(copy.deepcopy(theirs)), context)
        for is_step, count, kept in passes:
            if is_step:
                found, kept = seen(cache, step(cache, count)), min(count, kept)
                for row in found[:kept]:
                    assert row == sorted(feed(theirs, 1))
                assert cache.trim(count - kept) == count - kept
            else:
                mask = theirs.make_mask(count)
                found = seen(cache, Block.real(mx.zeros((1, count), dtype=mx.int32)))
                given = feed(theirs, count)
                if isinstance(mask, mx.array):
                    for row, visible in zip(found, np.array(mask), strict=True):
                        assert row == [place for place, sees in zip(given, visible, strict=True) if sees]
                else:
                    assert found[-1] == sorted(given)
            assert cache.offset == theirs.offset
            if again:
                cache = BlockCache(KeepingCache(cache.inner.hand_back()), context)
        handed = cache.inner.hand_back()
        for count in (1, 3, 1):
            assert sorted(feed(handed, count)) == sorted(feed(theirs, count))


@pytest.mark.parametrize("already", [0, 3, 5, 11, 40])
def test_trees_and_slots(already: int) -> None:
    """By the definition: a row sees its own path, and of the rows before it the first ones and the last ones."""
    size, shape = 12, block_shape(3, (0, 2, 0, 1), 0, (-1, -1, 1))
    theirs = RotatingKVCache(size, keep=KEEP)
    if already:
        feed(theirs, already)
    cache, context = KeepingCache(theirs), RowContext()
    with context.running(Block.decode(mx.zeros((4,), dtype=mx.int32), shape, already, 100)):
        view = BlockCache(cache, context)
        mask = np.array(view.make_mask(shape.rows))
        keys = view.update_and_fetch(rows(already, shape.rows), rows(already, shape.rows))[0]
    where = [*positions(keys)[: -shape.rows], *(already + shape.offsets)]
    for row, own in enumerate(already + shape.offsets):
        for column, place in enumerate(where):
            path = column < len(where) - shape.rows or shape.visibility[row, column - len(where) + shape.rows]
            assert mask[row, column] == (path and (place < KEEP or own - place < size - KEEP))


def test_what_it_refuses() -> None:
    cache = BlockCache(KeepingCache(RotatingKVCache(12, keep=KEEP)), RowContext())
    feed(cache, 3)
    with cache.rows.running(step(cache, 2)), pytest.raises(MTPError, match="leave `max_kv_size` out"):
        cache.make_mask(2, window_size=6)
    for _ in range(40):
        feed(cache, 1)
    cache.inner._end = 9
    with pytest.raises(ValueError, match="a cache of 12 rows cannot remove 3"):
        cache.trim(3)


def test_the_buffer_stays_small() -> None:
    cache: Any = KeepingCache(RotatingKVCache(50, keep=KEEP))
    for _ in range(1500):
        cache.update_and_fetch(rows(0, 1), rows(0, 1))
    assert cache.nbytes <= (50 + 3 * window_cache.ROOM) * 2 * 3 * 4 * 2
