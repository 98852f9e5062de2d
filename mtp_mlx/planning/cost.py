"""c(R): seconds of a step as a function of its rows, for one model on this machine.

Pure arithmetic over a table of measurements made by `timing.py`, which may have had no time for all of them. The cost
of a row is neither zero nor constant: matmul times are a staircase in the number of rows, attention grows with rows
times context, and slots add low-rank work. The table therefore holds times by rows at a short and at a long context,
and a surcharge for slots; it is interpolated linearly and extrapolated with the last slope.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mtp_mlx.decode.layout import Layout
from mtp_mlx.files import warn_once, write_text

UNMEASURED_DRAFT = 0.25  # of a plain step: seconds to draft a token if there was no time to measure it

log = logging.getLogger("mtp_mlx")


@dataclass(frozen=True)
class StepCost:
    """Measured seconds of steps. What was not measured is priced so that it is not chosen for being unknown.

    Attributes:
        rows: numbers of real rows measured, increasing, from 1. If 1 is the only one, every further row is taken to
            cost another step.
        contexts: the short and the long context, in cached tokens.
        short, long: seconds of a step without slots at either context, per entry of `rows`; `long` is empty if not
            measured, and then a long context costs nothing.
        slot_rows: numbers of slot rows measured, increasing, including those that draft nothing.
        surcharge: seconds that slot rows cost beyond as many real rows, per entry of `slot_rows`. If there are none,
            a slot row is taken to cost twice as much as a real one.
        draft: seconds to draft one token, from slots or in a chain; None if not measured (`draft_seconds`).
        plain: seconds of a plain step that overlaps with the host, at the short and then the long context, as far
            as measured.
        lead: rows at the start of every slot group that draft nothing.
        saved_up: seconds that runs have saved up for measuring the rest.
    """

    rows: tuple[int, ...]
    contexts: tuple[int, int]
    short: tuple[float, ...]
    long: tuple[float, ...]
    slot_rows: tuple[int, ...]
    surcharge: tuple[float, ...]
    draft: float | None
    plain: tuple[float, ...]
    lead: int = 0
    saved_up: float = 0.0

    def seconds(self, layout: Layout, context: int) -> float:
        """Seconds of a step in `layout` with `context` cached tokens."""
        if layout == Layout.plain():
            return self._at(context, self.plain_seconds, (self.plain or (self.short[0],))[-1])
        rows = self.rows_of(layout)
        short = self._of_rows(self.short, rows)
        body = self._at(context, short, self._of_rows(self.long, rows) if self.long else short)
        slot_rows = layout.slot_rows + layout.lead_rows(self.lead)
        return body + self._extra(slot_rows) + self.draft_seconds * max(*layout.slots, layout.chain)

    @property
    def plain_seconds(self) -> float:
        """Seconds of a plain step at the short context; if not measured, of any step of one row."""
        return self.plain[0] if self.plain else self.short[0]

    @property
    def draft_seconds(self) -> float:
        """Seconds to draft one token; if not measured, a quarter of a plain step."""
        return UNMEASURED_DRAFT * self.plain_seconds if self.draft is None else self.draft

    def _of_rows(self, seconds: tuple[float, ...], rows: int) -> float:
        """Seconds of a pass over so many rows, of the measured `seconds` at one context."""
        return seconds[0] * rows if len(self.rows) == 1 else interpolate(self.rows, seconds, rows)

    def _extra(self, slot_rows: int) -> float:
        """Seconds that slot rows cost beyond as many real rows."""
        if self.slot_rows:
            return max(0.0, interpolate((0, *self.slot_rows), (0.0, *self.surcharge), slot_rows))
        most = max(2, self.rows[-1])
        a_row = (self._of_rows(self.short, most) - self.short[0]) / (most - 1)
        return slot_rows * max(0.0, a_row)

    def rows_of(self, layout: Layout) -> int:
        """All rows of a step's pass, including those that draft nothing."""
        return layout.rows + layout.lead_rows(self.lead)

    def _at(self, context: int, short: float, long: float) -> float:
        low, high = self.contexts
        return max(short + (long - short) * (context - low) / max(1, high - low), 0.5 * short)


def interpolate(xs: Sequence[float], ys: Sequence[float], x: float) -> float:
    """Piecewise linear through (xs, ys): constant before the first point, the last slope (at least 0) after the last.

    Raises:
        ValueError: if xs is empty.
    """
    if not xs:
        raise ValueError("nothing to interpolate")
    if x <= xs[0]:
        return ys[0]
    for (x0, y0), (x1, y1) in zip(zip(xs, ys, strict=True), zip(xs[1:], ys[1:], strict=True), strict=False):
        if x <= x1:
            return y0 + (y1 - y0) * (x - x0) / (x1 - x0)
    if len(xs) == 1:
        return ys[0]
    slope = max(0.0, (ys[-1] - ys[-2]) / (xs[-1] - xs[-2]))
    return ys[-1] + slope * (x - xs[-1])


def save_cost(path: Path, cost: StepCost, key: dict[str, str]) -> None:
    """Writes a measurement with its key."""
    write_text(path, json.dumps({"key": key, "cost": asdict(cost)}, indent=2) + "\n")


def read_cost(path: Path, key: dict[str, str]) -> StepCost | None:
    """Reads a measurement; None if there is none, its key differs, or it is damaged (which is logged)."""
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError) as error:
        warn_once(str(path), f"{path} cannot be read ({error}): step costs are measured again")
        return None
    try:
        if stored["key"] != key:
            return None
        values: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else None if value is None else float(value)
            for name, value in stored["cost"].items()
        }
        return StepCost(**{**values, "lead": int(values.get("lead", 0))})
    except (ValueError, KeyError, TypeError, AttributeError):
        log.warning("%s is damaged: step costs are measured again", path)
        return None
