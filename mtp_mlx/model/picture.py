"""Pictures of a block: the rows of a forward pass, their positions and visibility, and what was accepted.

Used by the documentation and the example notebook only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

import numpy as np

from mtp_mlx.model.block import BlockShape

CELL = 22  # side of a square in the SVG, in pixels
LABEL_WIDTH = 190
COLOURS = {
    "pending": "#555555",
    "accepted": "#2f9e44",
    "rejected": "#e03131",
    "draft": "#1c7ed6",
    "slot": "#f59f00",
}


@dataclass(frozen=True)
class Row:
    """One row of a block, as shown to people.

    Attributes:
        kind: "pending", "draft" ("accepted" or "rejected" once that is known), or "slot".
        text: what the row holds.
        offset: position relative to the pending token.
        sees: [R] whether it sees each row of the block.
    """

    kind: str
    text: str
    offset: int
    sees: tuple[bool, ...]


def rows_of(
    shape: BlockShape, accepted: int | Sequence[int] | None = None, texts: tuple[str, ...] = ()
) -> list[Row]:
    """The rows of a block, in memory order.

    Args:
        shape: the block's rows.
        accepted: number of accepted drafts of a chain, or the rows of those of a tree; None if not known yet.
        texts: one text per real row, the pending token first; none to show numbers only.

    Raises:
        ValueError: if more drafts were accepted than there are, or the number of texts is not that of real rows.
    """
    drafts = shape.n_real - 1
    if isinstance(accepted, int):
        if not 0 <= accepted <= drafts:
            raise ValueError(f"{accepted} of {drafts} drafts cannot be accepted")
        accepted = range(1, 1 + accepted)
    chain = np.array_equal(shape.offsets[: shape.n_real], np.arange(shape.n_real))
    if texts and len(texts) != shape.n_real:
        raise ValueError(f"{len(texts)} texts for {shape.n_real} real rows")
    rows = []
    for index in range(shape.rows):
        sees = tuple(bool(one) for one in shape.visibility[index])
        if index < shape.n_real:
            kind, text = _real(index, accepted)
            text = f"{text} {texts[index]!r}" if texts else text
        else:
            group = max(row for row, start in enumerate(shape.group_start) if start <= index)
            number = int(shape.slot_index[index - shape.n_real]) + 1 - shape.lead
            after = f"{group} accepted" if chain else f"row {group}"
            kind, text = "slot", f"slot {number} after {after}"
        rows.append(Row(kind, text, int(shape.offsets[index]), sees))
    return rows


def _real(index: int, accepted: Sequence[int] | None) -> tuple[str, str]:
    """(kind, text) of a real row."""
    if index == 0:
        return "pending", "pending token"
    if accepted is None:
        return "draft", f"draft {index}"
    kind = "accepted" if index in accepted else "rejected"
    return kind, f"draft {index}, {kind}"


def block_text(
    shape: BlockShape, accepted: int | Sequence[int] | None = None, texts: tuple[str, ...] = ()
) -> str:
    """The rows as lines of text: number, position, content, and an x for every row that it sees."""
    rows = rows_of(shape, accepted, texts)
    width = max(len(row.text) for row in rows)
    lines = [f"row  position  {'holds':<{width}}  sees the cached text and rows"]
    for number, row in enumerate(rows):
        marks = "".join("x" if seen else "." for seen in row.sees)
        lines.append(f"{number:>3}  {'n+' + str(row.offset):>8}  {row.text:<{width}}  {marks}")
    return "\n".join(lines)


def block_svg(
    shape: BlockShape, accepted: int | Sequence[int] | None = None, texts: tuple[str, ...] = ()
) -> str:
    """The rows as an SVG: a line per row, with a square for each row that it sees, coloured by that row's kind."""
    rows = rows_of(shape, accepted, texts)
    width, height = LABEL_WIDTH + CELL * len(rows) + 10, CELL * len(rows) + 10
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" font-family="sans-serif" '
        'font-size="12">',
        f'<rect width="{width}" height="{height}" fill="white"/>',
    ]
    for number, row in enumerate(rows):
        top = 5 + CELL * number
        colour = COLOURS[row.kind]
        label = escape(f"n+{row.offset}  {row.text}")
        parts.append(f'<text x="5" y="{top + 15}" fill="{colour}">{label}</text>')
        for column, seen in enumerate(row.sees):
            fill = COLOURS[rows[column].kind] if seen else "#f1f3f5"
            left = LABEL_WIDTH + CELL * column
            parts.append(f'<rect x="{left}" y="{top}" width="{CELL - 2}" height="{CELL - 2}" fill="{fill}"/>')
    return "\n".join([*parts, "</svg>"])
