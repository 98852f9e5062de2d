"""Cost curves: what a forward pass over R rows costs on some machine, as published.

The built-in ones are in `curves.json`, each with its source. A file of your own holds one such object:

    {"machine": "...", "of": "what was timed", "source": "where it stands", "rows": [1, 4, 8], "cost": [1, 1.1, 1.7]}

with "low" and "high" instead of "cost" if only a range is known. Units do not matter: costs are taken relative to the
first row. Nothing is extrapolated beyond the last point.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mtp_mlx.errors import MTPError
from mtp_mlx.files import user_path
from mtp_mlx.planning.cost import interpolate

_BUILT_IN = Path(__file__).parent / "curves.json"
MOST_ROWS, LEAST_COST, MOST_COST = 10**6, 1e-100, 1e100  # JSON numbers are unbounded, floats are not
_TEXTS = ("machine", "of", "source")


@dataclass(frozen=True)
class CostCurve:
    """Cost by rows, relative to one row.

    Attributes:
        name: of a built-in curve, or of the file without its suffix.
        machine, of, source: which machine, what was timed, and where it was published.
        rows: numbers of rows that were timed, increasing, from 1.
        low, high: bounds of the cost at each of them; equal if it is one figure.
    """

    name: str
    machine: str
    of: str
    source: str
    rows: tuple[int, ...]
    low: tuple[float, ...]
    high: tuple[float, ...]

    @property
    def most_rows(self) -> int:
        """The largest number of rows on the curve."""
        return self.rows[-1]

    def cost(self, rows: int) -> tuple[float, float] | None:
        """(low, high) cost of a pass over `rows`, interpolated linearly; None beyond the last point."""
        if rows > self.most_rows:
            return None
        return interpolate(self.rows, self.low, rows), interpolate(self.rows, self.high, rows)


def built_in() -> dict[str, CostCurve]:
    """The curves that ship with the package, by name."""
    content = json.loads(_BUILT_IN.read_text(encoding="utf-8"))
    return {name: _curve(name, values, str(_BUILT_IN)) for name, values in content.items()}


def read_curve(name: str) -> CostCurve:
    """A built-in curve by name, or the curve in a JSON file.

    Raises:
        MTPError: neither exists, or the file is damaged.
    """
    curves = built_in()
    if name in curves:
        return curves[name]
    path = user_path(name)
    if not path.is_file():
        raise MTPError(f"no cost curve '{name}': choose one of {', '.join(curves)}, or give a JSON file")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise MTPError(f"{path} cannot be read as JSON: {error}") from error
    return _curve(path.stem, values, str(path))


def _curve(name: str, values: Any, where: str) -> CostCurve:
    if not isinstance(values, dict) or not all(isinstance(values.get(key), str) for key in _TEXTS):
        raise MTPError(
            f"{where}: a cost curve needs the texts {', '.join(_TEXTS)}, and numbers `rows` and `cost`"
        )
    rows = values.get("rows")
    low: Any = values.get("low", values.get("cost"))
    high: Any = values.get("high", values.get("cost"))
    if not isinstance(rows, list) or not all(type(row) is int for row in rows) or rows[:1] != [1]:
        raise MTPError(f"{where}: `rows` must be whole numbers and begin with 1")
    if rows[-1] > MOST_ROWS:
        raise MTPError(f"{where}: `rows` must be at most {MOST_ROWS}")
    if any(after <= before for before, after in zip(rows, rows[1:])):
        raise MTPError(f"{where}: `rows` must increase")
    for key, costs in (("low", low), ("high", high)):
        if not isinstance(costs, list) or len(costs) != len(rows) or not all(map(_is_cost, costs)):
            raise MTPError(f"{where}: `{key}` (or `cost`) must hold a positive number for each of `rows`")
    if any(least > most for least, most in zip(low, high)):
        raise MTPError(f"{where}: `low` must not be above `high`")
    texts = {key: values[key] for key in _TEXTS}
    lows, highs = (tuple(cost / costs[0] for cost in costs) for costs in (low, high))
    return CostCurve(name, rows=tuple(rows), low=lows, high=highs, **texts)


def _is_cost(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and LEAST_COST <= value <= MOST_COST
