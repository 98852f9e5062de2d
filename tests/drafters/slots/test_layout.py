"""Proves the training layout row by row against loops: positions, who sees whom, targets, labels, padding.

Blocks of one length are checked place by place, blocks of any length by which rows there are and what they see.
"""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mtp_mlx.drafters.slots.layout import SlotLayout, build_layout, candidate_anchors
from mtp_mlx.drafters.slots.step import BlockChoice
from mtp_mlx.train.data import Example


@st.composite
def batches(draw: st.DrawFn) -> tuple[list[list[int]], list[np.ndarray], int, int]:
    """Sequences of different lengths with some anchors each, k slots, G blocks per chunk."""
    sequences, anchors = [], []
    for index in range(draw(st.integers(1, 4))):
        length = draw(st.integers(3, 14))
        # Every token is different, so that a row taken from elsewhere is seen.
        sequences.append([1000 * (index + 1) + position for position in range(length)])
        own = draw(st.sets(st.integers(0, length - 3), min_size=0 if index else 1))
        anchors.append(np.array(sorted(own), dtype=np.int32))
    return sequences, anchors, draw(st.integers(1, 5)), draw(st.integers(1, 6))


def rows_of(layout: SlotLayout) -> dict[int, tuple[int, int, int, int]]:
    """{slot row: (depth, target, previous, label)} of the supervised rows."""
    values = zip(layout.rows, layout.depth, layout.target, layout.previous, layout.label, strict=True)
    return {int(row): tuple(int(value) for value in rest) for row, *rest in values}


@given(batches())
def test_every_row_has_the_target_that_follows_it(
    batch: tuple[list[list[int]], list[np.ndarray], int, int],
) -> None:
    sequences, anchors, slots, chunk_blocks = batch
    layout = build_layout(sequences, anchors, slots, chunk_blocks)
    length, blocks = layout.tokens.shape[1], layout.anchors.shape[1]
    chunk_blocks = min(chunk_blocks, max(len(own) for own in anchors))
    assert layout.chunk_rows == chunk_blocks * slots and (layout.lengths == slots).all()
    assert blocks % chunk_blocks == 0 and blocks - max(map(len, anchors)) < chunk_blocks
    expected = {}
    for index, (sequence, own) in enumerate(zip(sequences, anchors, strict=True)):
        for block, anchor in enumerate(own):
            for slot in range(1, slots + 1):
                predicted = int(anchor) + slot + 1  # mask j behind x[i] predicts x[i + 1 + j]
                if predicted < len(sequence):
                    row = (index * blocks + block) * slots + slot - 1
                    real_row = index * length + predicted - 1
                    expected[row] = (slot, real_row, sequence[predicted - 1], sequence[predicted])
    assert rows_of(layout) == expected
    for index, sequence in enumerate(sequences):
        assert layout.tokens[index].tolist() == sequence + [0] * (length - len(sequence))


@given(batches())
def test_rows_stand_and_see_as_in_the_paper(
    batch: tuple[list[list[int]], list[np.ndarray], int, int],
) -> None:
    sequences, anchors, slots, chunk_blocks = batch
    layout = build_layout(sequences, anchors, slots, chunk_blocks)
    positions, visibility = layout.positions(), layout.visibility()
    group = layout.chunk_rows // slots
    length = max(int(own.max()) for own in anchors if len(own)) + 1
    assert positions.shape == (len(sequences) * layout.chunks, group * slots)
    assert visibility.shape == (*positions.shape, length + group * slots)
    for index, own in enumerate(anchors):
        for block, anchor in enumerate(own):
            chunk, place = index * layout.chunks + block // group, block % group
            for slot in range(1, slots + 1):
                row = place * slots + slot - 1
                assert positions[chunk, row] == anchor + slot
                seen = {int(column) for column in np.flatnonzero(visibility[chunk, row])}
                own_slots = {length + place * slots + other for other in range(slot)}
                assert seen == set(range(anchor + 1)) | own_slots


@given(batches(), st.integers(0, 1), st.data())
def test_blocks_of_any_length_are_the_first_rows_of_whole_blocks(
    batch: tuple[list[list[int]], list[np.ndarray], int, int], lead: int, data: st.DataObject
) -> None:
    sequences, anchors, slots, chunk_blocks = batch
    lengths = [
        np.array(data.draw(st.lists(st.integers(1, slots), min_size=len(own), max_size=len(own))), dtype=int)
        for own in anchors
    ]
    layout = build_layout(sequences, anchors, slots, chunk_blocks, lead, lengths)
    found = seen_by_row(layout)
    length = layout.tokens.shape[1]
    expected = []
    for index, (sequence, own) in enumerate(zip(sequences, anchors, strict=True)):
        for anchor, count in zip(own.tolist(), lengths[index].tolist(), strict=True):
            for slot in range(1 - lead, count + 1):
                predicted = anchor + slot + 1
                if predicted < len(sequence):
                    targets = (index * length + predicted - 1, sequence[predicted - 1], sequence[predicted])
                    own_slots = [(anchor + other, other) for other in range(1 - lead, slot + 1)]
                    expected.append((slot, *targets, (index, anchor + slot, anchor + 1, own_slots)))
    assert found == expected


@given(batches(), st.data())
def test_little_is_filled_up(
    batch: tuple[list[list[int]], list[np.ndarray], int, int], data: st.DataObject
) -> None:
    """A chunk of the longest sequence lacks fewer rows than a block has, but for the last."""
    sequences, anchors, slots, chunk_blocks = batch
    lengths = [
        np.array(data.draw(st.lists(st.integers(1, slots), min_size=len(own), max_size=len(own))), dtype=int)
        for own in anchors
    ]
    layout = build_layout(sequences, anchors, slots, chunk_blocks, lengths=lengths)
    whole = max(int(own.sum()) for own in lengths)
    assert layout.chunk_rows == min(chunk_blocks * slots, whole)
    assert layout.chunks == 1 or layout.chunks <= -(-whole // (layout.chunk_rows - slots + 1))
    assert (layout.lengths.sum(axis=1) == layout.chunks * layout.chunk_rows).all()


def seen_by_row(
    layout: SlotLayout,
) -> list[tuple[int, int, int, int, tuple[int, int, int, list[tuple[int, int]]]]]:
    """Per supervised row (slot, target, previous, label, (sequence, position, prefix seen, slots seen)).

    A slot that is seen is given by its position and its number in its block.
    """
    positions, visibility = layout.positions(), layout.visibility()
    length = layout.seen()
    number = layout.slot.reshape(positions.shape) + 1 - layout.lead
    found = []
    rows = zip(layout.rows, layout.depth, layout.target, layout.previous, layout.label, strict=True)
    for row, *values in rows:
        chunk, place = divmod(int(row), layout.chunk_rows)
        prefix, own = visibility[chunk, place, :length], np.flatnonzero(visibility[chunk, place, length:])
        assert prefix[: prefix.sum()].all(), "the prefix that a row sees has no gap"
        slots = [(int(positions[chunk, other]), int(number[chunk, other])) for other in own]
        seen = (chunk // layout.chunks, int(positions[chunk, place]), int(prefix.sum()), slots)
        depth, target, previous, label = (int(value) for value in values)
        found.append((depth, target, previous, label, seen))
    return found


def test_candidates_go_from_the_last_prompt_token_to_the_last_with_a_target() -> None:
    """x[anchor + 2] is what slot 1 predicts, so it must be there."""
    assert candidate_anchors(length=8, loss_start=4).tolist() == [3, 4, 5]
    assert candidate_anchors(length=8, loss_start=0).tolist() == [0, 1, 2, 3, 4, 5]
    assert candidate_anchors(length=5, loss_start=4).tolist() == []  # a response of one token


def test_a_batch_without_blocks_is_refused() -> None:
    with pytest.raises(ValueError, match="no block in this batch"):
        build_layout([[1, 2, 3]], [np.array([], dtype=np.int32)], 2, 4)


def test_blocks_of_a_step_depend_on_seed_and_step_alone() -> None:
    examples = [Example(list(range(30)), 10), Example(list(range(12)), 3)]
    choice = BlockChoice(slots=2, share=0.5, chunk_blocks=4)

    def chosen(seed: int, step: int) -> list[list[int]]:
        layout = choice.layout(examples, seed, step)
        blocks = layout.anchors.shape[1]
        used = np.unique(layout.rows // 2)
        return [
            layout.anchors[index, [u % blocks for u in used if u // blocks == index]].tolist()
            for index in (0, 1)
        ]

    assert chosen(0, 1) == chosen(0, 1)
    assert chosen(0, 1) != chosen(0, 2) and chosen(0, 1) != chosen(1, 1)
    first, second = chosen(0, 1)
    assert len(first) == 10 and len(second) == 4  # half of 19 and of 8, rounded up
    assert set(first) <= set(range(9, 28)) and first == sorted(first)
    most = BlockChoice(slots=2, share=1.0, most=3, chunk_blocks=4).layout(examples, 0, 0)
    assert most.anchors.shape == (2, 3)


def test_random_lengths_are_drawn_evenly_at_the_anchors_of_fixed_ones() -> None:
    examples = [Example(list(range(4003)), 0), Example(list(range(8)), 3)]
    fixed = BlockChoice(slots=4, share=0.5).layout(examples, 0, 7)
    choice = BlockChoice(slots=4, share=0.5, lengths="random")
    layout = choice.layout(examples, 0, 7)

    def blocks_of(layout: SlotLayout) -> dict[tuple[int, int], int]:
        """{(sequence, anchor): supervised slots}."""
        sequence = layout.target // layout.tokens.shape[1]
        anchor = layout.target % layout.tokens.shape[1] - layout.depth
        counts: dict[tuple[int, int], int] = {}
        for key in zip(sequence.tolist(), anchor.tolist(), strict=True):
            counts[key] = counts.get(key, 0) + 1
        return counts

    random, whole = blocks_of(layout), blocks_of(fixed)
    assert random.keys() == whole.keys()
    counts = np.bincount(list(random.values()), minlength=5)[1:]
    assert counts.sum() == 2001 + 2 and counts.min() > 430 and counts.max() < 570
    assert layout.rows.size < fixed.rows.size * 0.66 and choice.mean_slots == 2.5
    again = choice.layout(examples, 0, 7)
    assert (again.rows == layout.rows).all() and (again.lengths == layout.lengths).all()
