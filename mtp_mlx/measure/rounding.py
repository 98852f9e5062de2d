"""Rows of reports as JSON values."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any


def rounded(row: Any) -> dict[str, Any]:
    """The fields of a dataclass, floats rounded to four decimals, in lists too."""
    return {name: _rounded(value) for name, value in asdict(row).items()}


def _rounded(value: Any) -> Any:
    if isinstance(value, list):
        return [_rounded(item) for item in value]
    return round(value, 4) if isinstance(value, float) else value
