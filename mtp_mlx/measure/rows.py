"""Rows of reports, as JSON values and as tables that fit a terminal of 80 columns."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from rich.box import SIMPLE
from rich.table import Table

RATIO, SAME_TEXT = "ratio", "same text"
_WITH_REMARKS = (RATIO, SAME_TEXT)  # such as "(mean 1.41x)", which may take a second line


def rounded(row: Any) -> dict[str, Any]:
    """The fields of a dataclass as JSON values, floats rounded to four decimals, in lists too."""
    return {name: _rounded(value) for name, value in asdict(row).items()}


def _rounded(value: Any) -> Any:
    if isinstance(value, list):
        return [_rounded(item) for item in value]
    return round(value, 4) if isinstance(value, float) else value


def lane_table(title: str, names: Sequence[str], numbers: Sequence[str]) -> Table:
    """An empty table with columns of names, which fold if they are long, and columns of numbers."""
    out = Table(title=title, title_justify="left", box=SIMPLE, pad_edge=False, padding=(0, 1, 0, 0))
    for name in names:
        out.add_column(name, overflow="fold", min_width=9)
    for number in numbers:
        wraps = number in _WITH_REMARKS
        out.add_column(number, justify="right", no_wrap=not wraps, min_width=7 if wraps else None)
    return out
