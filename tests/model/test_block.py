"""Proves the layout arithmetic of a block: counts, positions, who sees whom, when it is an ordinary pass."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mtp_mlx.model.block import Block, block_shape

layouts = st.integers(0, 6).flatmap(lambda drafts: st.tuples(*[st.integers(0, 5)] * (drafts + 1)))


@given(layouts)
def test_rows_are_counted_and_placed(slots: tuple[int, ...]) -> None:
    shape = block_shape(len(slots) - 1, slots)
    assert shape.n_real == len(slots)
    assert shape.rows == len(slots) + sum(slots) == len(shape.offsets) == len(shape.visibility)
    expected_offsets, expected_index, starts = list(range(len(slots))), [], []
    for accepted, count in enumerate(slots):
        starts.append(len(expected_offsets))
        for slot in range(1, count + 1):  # slot j of group a stands where the token at offset a + j will
            expected_offsets.append(accepted + slot)
            expected_index.append(slot - 1)
    assert shape.offsets.tolist() == expected_offsets
    assert shape.slot_index.tolist() == expected_index
    assert list(shape.group_start) == starts
    assert shape.offsets.dtype == shape.slot_index.dtype == np.int32


@given(layouts)
def test_every_row_sees_one_chain_of_tokens(slots: tuple[int, ...]) -> None:
    """The rows seen by a row stand at offsets 0, 1, 2, ... up to its own: a sequence, with nothing twice."""
    shape = block_shape(len(slots) - 1, slots)
    for row in range(shape.rows):
        seen = np.flatnonzero(shape.visibility[row])
        assert sorted(shape.offsets[seen]) == list(range(shape.offsets[row] + 1))
        assert shape.visibility[row, row]
        if row < shape.n_real:
            assert (seen < shape.n_real).all()  # a real row sees no slot


@given(layouts)
def test_visibility_is_transitive(slots: tuple[int, ...]) -> None:
    sees = block_shape(len(slots) - 1, slots).visibility
    through_another = sees.astype(int) @ sees.astype(int) > 0
    assert not (through_another & ~sees).any()
    assert not (sees & sees.T & ~np.eye(len(sees), dtype=bool)).any()  # and never mutual


@given(layouts)
def test_contiguous_means_an_ordinary_causal_pass(slots: tuple[int, ...]) -> None:
    shape = block_shape(len(slots) - 1, slots)
    ordinary = shape.offsets.tolist() == list(range(shape.rows)) and np.array_equal(
        shape.visibility, np.tril(np.ones((shape.rows, shape.rows), dtype=bool))
    )
    assert shape.contiguous == ordinary
    assert shape.contiguous == (not any(slots[:-1]))  # only slots behind all drafts continue the sequence


def test_groups_must_match_drafts() -> None:
    with pytest.raises(ValueError, match="2 drafts need 3 slot groups, got 2"):
        block_shape(2, (1, 1))


def test_decode_blocks() -> None:
    shape = block_shape(1, (2, 1))
    block = Block.decode(mx.array([7, 8]), shape, start=10, vocab_size=100)
    assert block.ids.tolist() == [[7, 8, 100, 101, 100]]
    assert block.positions is not None and block.positions.tolist() == [10, 11, 11, 12, 12]
    assert block.visibility is not None and block.visibility.shape == (5, 5)
    linear = Block.decode(mx.array([7, 8]), block_shape(1, (0, 2)), start=10, vocab_size=100)
    assert linear.positions is None and linear.visibility is None and linear.n_real == 2
    assert Block.real(mx.array([[1, 2, 3]])).n_real == 3


@given(layouts)
def test_a_lead_is_one_more_row_of_every_group_that_is_not_empty(slots: tuple[int, ...]) -> None:
    """It stands where the group's last real row stands, sees what slot 1 sees, and is seen by its group."""
    bare, shape = block_shape(len(slots) - 1, slots), block_shape(len(slots) - 1, slots, lead=1)
    assert shape.rows == bare.rows + sum(count > 0 for count in slots)
    for accepted, count in enumerate(slots):
        if count == 0:
            continue
        rows = np.arange(shape.group_start[accepted], shape.group_start[accepted] + count + 1)
        assert shape.offsets[rows].tolist() == list(range(accepted, accepted + count + 1))
        for place, row in enumerate(rows):
            assert np.flatnonzero(shape.visibility[row]).tolist() == [
                *range(accepted + 1),
                *rows[: place + 1],
            ]
    assert not any(slots) or not shape.contiguous


# --- trees --------------------------------------------------------------------------------------------------------


@st.composite
def trees(draw: st.DrawFn) -> tuple[tuple[int, ...], tuple[int, ...], int]:
    """(parents, slots behind every real row, lead)."""
    parents: list[int] = []
    for node in range(draw(st.integers(0, 8))):
        parents.append(draw(st.integers(-1, node - 1)))
    slots = draw(st.tuples(*[st.integers(0, 3)] * (len(parents) + 1)))
    return tuple(parents), slots, draw(st.integers(0, 1))


@given(trees())
def test_a_row_of_a_tree_sees_its_ancestors_and_stands_behind_them(
    tree: tuple[tuple[int, ...], tuple[int, ...], int],
) -> None:
    parents, slots, lead = tree
    shape = block_shape(len(parents), slots, lead, parents)

    def path(row: int) -> list[int]:
        return [0] if row == 0 else [*path(parents[row - 1] + 1), row]

    row = shape.n_real
    for real in range(shape.n_real):
        assert np.flatnonzero(shape.visibility[real]).tolist() == path(real)
        assert shape.offsets[real] == len(path(real)) - 1
        assert shape.group_start[real] == row
        for index in range(slots[real] + lead if slots[real] else 0):
            assert np.flatnonzero(shape.visibility[row]).tolist() == [
                *path(real),
                *range(row - index, row + 1),
            ]
            assert shape.offsets[row] == len(path(real)) - lead + index
            row += 1
    assert row == shape.rows


@given(layouts)
def test_a_tree_without_branches_is_the_chain(slots: tuple[int, ...]) -> None:
    drafts = len(slots) - 1
    chain, tree = block_shape(drafts, slots), block_shape(drafts, slots, 0, tuple(range(-1, drafts - 1)))
    assert np.array_equal(chain.visibility, tree.visibility) and np.array_equal(chain.offsets, tree.offsets)
    assert chain.group_start == tree.group_start and chain.contiguous == tree.contiguous
