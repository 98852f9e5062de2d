"""Proves that pictures of a block say what its shape says: rows, positions, visibility, accepted drafts."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree

import pytest

from mtp_mlx.model.block import block_shape
from mtp_mlx.model.picture import COLOURS, block_svg, block_text, rows_of

SVG = "{http://www.w3.org/2000/svg}"


def test_text() -> None:
    lines = block_text(block_shape(1, (2, 1)), accepted=1, texts=("a", "b")).splitlines()
    assert lines == [
        "row  position  holds                    sees the cached text and rows",
        "  0       n+0  pending token 'a'        x....",
        "  1       n+1  draft 1, accepted 'b'    xx...",
        "  2       n+1  slot 1 after 0 accepted  x.x..",
        "  3       n+2  slot 2 after 0 accepted  x.xx.",
        "  4       n+2  slot 1 after 1 accepted  xx..x",
    ]


def test_slots_of_parallel_token_prediction_have_a_leading_one() -> None:
    assert [row.text for row in rows_of(block_shape(0, (2,), lead=1))[1:]] == [
        f"slot {number} after 0 accepted" for number in (0, 1, 2)
    ]


def test_drawing() -> None:
    shape = block_shape(2, (1, 0, 2))
    root = ElementTree.fromstring(block_svg(shape, accepted=1, texts=("<", "&", '"')))
    labels = [text.text or "" for text in root.iter(f"{SVG}text")]
    assert len(labels) == shape.rows and labels[1] == "n+1  draft 1, accepted '&'" and "rejected" in labels[2]
    squares = [rect.get("fill") for rect in root.iter(f"{SVG}rect")][1:]
    kinds = [row.kind for row in rows_of(shape, 1)]
    expected = [
        COLOURS[kinds[column]] if shape.visibility[row, column] else "#f1f3f5"
        for row in range(shape.rows)
        for column in range(shape.rows)
    ]
    assert squares == expected and kinds == ["pending", "accepted", "rejected", "slot", "slot", "slot"]


def test_impossible_outcomes_are_refused() -> None:
    with pytest.raises(ValueError, match="3 of 2 drafts"):
        rows_of(block_shape(2, (0, 0, 0)), accepted=3)
    with pytest.raises(ValueError, match="1 texts for 3 real rows"):
        rows_of(block_shape(2, (0, 0, 0)), texts=("a",))


def test_a_tree_is_accepted_by_rows() -> None:
    rows = rows_of(block_shape(3, (0, 0, 1, 0), parents=(-1, -1, 0)), accepted=(2,))
    assert [row.kind for row in rows] == ["pending", "rejected", "accepted", "rejected", "slot"]
    assert rows[4].text == "slot 1 after row 2" and rows[4].sees == (True, False, True, False, True)
