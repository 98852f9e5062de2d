"""Proves that regions, masks, duplicated positions, labels and visibility equal a construction row by row."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mtp_mlx.drafters.masks.joint_step import supervised_rows, tokens_at
from mtp_mlx.drafters.masks.regions import (
    draw_regions,
    real_tokens,
    region_anchors,
    region_layout,
    regions_over,
)
from mtp_mlx.drafters.slots.layout import build_layout, candidate_anchors
from mtp_mlx.train.data import Example


def built(
    rows: int, regions: int, k: int, offset: int
) -> tuple[list[int], list[bool], list[bool], list[int]]:
    """(positions, masked, predicts, region) as the paper's code builds them, one row at a time.

    All regions from the text's start; then `offset` rows are dropped at the front, as many real tokens appended, and
    all positions lowered.
    """
    masks = k - 1
    real = rows // regions - masks
    out: list[tuple[int, bool, bool, int]] = []
    for region in range(regions):
        start = region * real
        for index in range(real):
            out.append((start + index, False, index == real - 1, region))
        for index in range(masks):
            out.append((start + real + index, True, True, region))
    dropped = out[offset:] + [(regions * real + index, False, False, regions) for index in range(offset)]
    positions, masked, predicts, region_of = zip(*dropped, strict=True)
    return [p - offset for p in positions], list(masked), list(predicts), list(region_of)


def seen(masked: list[bool], region: list[int]) -> np.ndarray:
    """Whom every row sees, pair by pair."""
    size = len(masked)
    out = np.zeros((size, size), dtype=bool)
    for row in range(size):
        for other in range(row + 1):
            out[row, other] = not masked[other] or (masked[row] and region[row] == region[other])
    return out


@settings(max_examples=200, deadline=None, derandomize=True, database=None)
@given(st.data())
def test_against_a_construction_row_by_row(data: st.DataObject) -> None:
    k = data.draw(st.integers(1, 7))
    region_rows = data.draw(st.integers(k, 12))
    regions = data.draw(st.integers(1, 5))
    offset = data.draw(st.integers(0, real_tokens(k, region_rows) - 1))
    layout = region_layout(regions, k, offset, region_rows)
    positions, masked, predicts, region = built(regions * region_rows, regions, k, offset)
    assert layout.positions.tolist() == positions
    assert layout.masked.tolist() == masked
    assert layout.predicts.tolist() == predicts
    assert np.array_equal(layout.visibility(), seen(masked, region))
    assert layout.groups.shape == (regions, k)
    real = [p for p, m in zip(positions, masked, strict=True) if not m]
    assert real == list(range(len(real))), "the real rows are the text, each token once"
    anchors = [p for p, m, y in zip(positions, masked, predicts, strict=True) if y and not m]
    assert layout.anchors.tolist() == anchors


def test_the_reference_s_worked_examples() -> None:
    layout = region_layout(3, 3, 0, 18 // 3)
    assert layout.positions.tolist() == [0, 1, 2, 3, 4, 5, 4, 5, 6, 7, 8, 9, 8, 9, 10, 11, 12, 13]
    assert layout.masked.astype(int).tolist() == [0, 0, 0, 0, 1, 1] * 3
    assert layout.predicts.astype(int).tolist() == [0, 0, 0, 1, 1, 1] * 3
    shifted = region_layout(3, 3, 2, 6)
    assert shifted.positions.tolist() == [0, 1, 2, 3, 2, 3, 4, 5, 6, 7, 6, 7, 8, 9, 10, 11, 10, 11]
    assert shifted.groups.shape == (3, 3)
    for k, real, used, masks, supervised in ((16, 17, 100, 75, 80), (2, 31, 156, 5, 10)):
        layout = region_layout(5, k, 0, 160 // 5)
        assert real_tokens(k, 32) == real and len(layout.positions) == 160
        assert layout.positions.max() + 1 == used
        assert (layout.masked.sum(), layout.predicts.sum()) == (masks, supervised)


@settings(max_examples=200, deadline=None, derandomize=True, database=None)
@given(st.integers(3, 60), st.integers(0, 40), st.integers(2, 6), st.integers(0, 9), st.integers(8, 16))
def test_anchors_that_learn(length: int, loss_start: int, k: int, offset: int, region_rows: int) -> None:
    """Those of the joint layout that lie in the response and leave the first mask a token to predict."""
    offset %= real_tokens(k, region_rows)
    found = region_anchors(length, loss_start, k, offset, region_rows).tolist()
    layout = region_layout(regions_over(length, k, offset, region_rows), k, offset, region_rows)
    assert layout.anchors[-1] >= length - 1, "no anchor of the text is left out"
    assert found == [a for a in layout.anchors.tolist() if max(loss_start - 1, 0) <= a < length - 2]


def test_every_draw_learns_something_and_every_k_and_offset_comes() -> None:
    examples = [Example(list(range(40)), 20), Example(list(range(9)), 6), Example([1, 2], 1)]
    drawn = set()
    for seed in range(600):
        k, offset = draw_regions(examples, 5, 8, np.random.default_rng(seed))
        assert 2 <= k <= 5 and 0 <= offset < real_tokens(k, 8)
        anchors = [region_anchors(len(e), e.loss_start, k, offset, 8) for e in examples]
        assert sum(map(len, anchors)) > 0
        assert all(
            np.isin(a, candidate_anchors(len(e), e.loss_start)).all()
            for a, e in zip(anchors, examples, strict=True)
        )
        drawn.add((k, offset))
    assert drawn == {(k, offset) for k in range(2, 6) for offset in range(8 - (k - 1))}


@pytest.mark.parametrize(("k", "offset", "region_rows"), [(9, 0, 8), (0, 0, 8), (3, 6, 8), (3, -1, 8)])
def test_impossible_layouts(k: int, offset: int, region_rows: int) -> None:
    with pytest.raises(ValueError, match="region"):
        region_layout(2, k, offset, region_rows)


def test_nothing_to_learn() -> None:
    with pytest.raises(ValueError, match="no region in this batch"):
        draw_regions([Example([1, 2], 1)], 3, 8, np.random.default_rng(0))


def labelled(
    examples: list[Example], k: int, offset: int, region_rows: int
) -> list[tuple[int, int, int, int]]:
    """(example, anchor, j, label) of everything a step predicts, by walking through the texts token by token."""
    out, real = [], region_rows - (k - 1)
    for index, example in enumerate(examples):
        ends = [end for end in range(real - 1 - offset, 200, real) if end < len(example)]
        for end in ends:
            first_is_an_answer = end + 1 >= example.loss_start
            mask_has_a_token = end + 2 < len(example)
            if first_is_an_answer and mask_has_a_token:
                for j in range(k):
                    if end + 1 + j < len(example):
                        out.append((index, end, j, example.tokens[end + 1 + j]))
    return sorted(out)


@settings(max_examples=150, deadline=None, derandomize=True, database=None)
@given(st.data())
def test_labels_against_a_walk_through_the_texts(data: st.DataObject) -> None:
    """Of the joint rows, and of the slots behind anchors, which lack the last real row's own prediction (j = 0)."""
    k = data.draw(st.integers(2, 6))
    region_rows = data.draw(st.integers(k + 1, 12))
    offset = data.draw(st.integers(0, real_tokens(k, region_rows) - 1))
    lengths = data.draw(st.lists(st.integers(3, 40), min_size=1, max_size=4))
    examples = [
        Example([100 * index + token for token in range(size)], data.draw(st.integers(0, size - 1)))
        for index, size in enumerate(lengths)
    ]
    expected = labelled(examples, k, offset, region_rows)

    layout = region_layout(regions_over(max(lengths), k, offset, region_rows), k, offset, region_rows)
    supervised = supervised_rows(examples, layout)
    follows = tokens_at(examples, layout.positions[layout.groups] + 1)
    joint = [
        (e, int(layout.anchors[r]), j, int(follows[e, r, j])) for e, r, j in np.argwhere(supervised).tolist()
    ]
    assert sorted(joint) == expected

    anchors = [region_anchors(len(e), e.loss_start, k, offset, region_rows) for e in examples]
    if not expected:
        assert not any(len(own) for own in anchors)
        return
    slots = build_layout([e.tokens for e in examples], anchors, k - 1, chunk_blocks=3)
    blocks = slots.anchors.shape[1]
    gated = []
    for row, depth, label in zip(
        slots.rows.tolist(), slots.depth.tolist(), slots.label.tolist(), strict=True
    ):
        block = row // (k - 1)
        gated.append((block // blocks, int(slots.anchors.reshape(-1)[block]), depth, label))
    assert sorted(gated) == [row for row in expected if row[2] > 0]
