"""Pictures of a block: which rows a forward pass has, where they stand, whom they see, and what was accepted.

For the documentation, the example notebook and anybody who wants to see a layout; nothing else uses them.
"""

from __future__ import annotations

from dataclasses import dataclass
from html import escape

from mtp_mlx.model.block import BlockShape

CELL = 22  # pixels of a square of the SVG
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
    """One row of a block, for people.

    Attributes:
        kind: "pending", "draft" (with a known outcome "accepted" or "rejected"), or "slot".
        text: what it holds.
        offset: its position relative to the pending token's.
        sees: for every row of the block whether this one sees it.
    """

    kind: str
    text: str
    offset: int
    sees: tuple[bool, ...]


def rows_of(shape: BlockShape, accepted: int | None = None, texts: tuple[str, ...] = ()) -> list[Row]:
    """The rows of a block in order of memory.

    Args:
        accepted: how many drafts were accepted, or None before that is known.
        texts: of the real rows, the pending token first; numbered names without them.

    Raises:
        ValueError: more accepted than there are drafts, or texts for another number of real rows.
    """
    drafts = shape.n_real - 1
    if accepted is not None and not 0 <= accepted <= drafts:
        raise ValueError(f"{accepted} of {drafts} drafts cannot be accepted")
    if texts and len(texts) != shape.n_real:
        raise ValueError(f"{len(texts)} texts for {shape.n_real} real rows")
    rows = []
    for index in range(shape.rows):
        sees = tuple(bool(one) for one in shape.visibility[index])
        if index < shape.n_real:
            kind, text = _real(index, accepted)
            text = f"{text} {texts[index]!r}" if texts else text
        else:
            group = max(a for a, start in enumerate(shape.group_start) if start <= index)
            number = int(shape.slot_index[index - shape.n_real]) + 1 - shape.lead
            kind, text = "slot", f"slot {number} behind {group} accepted"
        rows.append(Row(kind, text, int(shape.offsets[index]), sees))
    return rows


def _real(index: int, accepted: int | None) -> tuple[str, str]:
    """(kind, what it holds) of a real row."""
    if index == 0:
        return "pending", "pending token"
    if accepted is None:
        return "draft", f"draft {index}"
    kind = "accepted" if index <= accepted else "rejected"
    return kind, f"draft {index}, {kind}"


def block_text(shape: BlockShape, accepted: int | None = None, texts: tuple[str, ...] = ()) -> str:
    """The rows as lines of text: number, position, what it holds, and an x for every row that it sees."""
    rows = rows_of(shape, accepted, texts)
    width = max(len(row.text) for row in rows)
    lines = [f"row  position  {'holds':<{width}}  sees the cached text and rows"]
    for number, row in enumerate(rows):
        marks = "".join("x" if seen else "." for seen in row.sees)
        lines.append(f"{number:>3}  {'n+' + str(row.offset):>8}  {row.text:<{width}}  {marks}")
    return "\n".join(lines)


def block_svg(shape: BlockShape, accepted: int | None = None, texts: tuple[str, ...] = ()) -> str:
    """The same as a drawing: a line per row, a filled square where it sees a row, coloured by what it holds."""
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
