"""What steps really take, compared with what the cost curve said: the curve was measured once, in another minute.

A machine gets slower and quicker (heat, other programs, a curve measured under load), and a curve that never
learns keeps the planner wrong for good. So every step's seconds are compared with the prediction, and the
planner uses prediction times `factor`.

Ratios are averaged as logarithms in a tree: all steps -> kind of step (plain, drafts only, slots, heads) -> number
of rows. A cell weighs its parent as PRIOR_STRENGTH observations of its own, so plain steps alone correct the
whole curve at first, and a kind of step that is seen goes its own way within a few steps.
"""

from __future__ import annotations

import math
from bisect import bisect_right

from mtp_mlx.decode.layout import Layout

ROW_EDGES = (2, 4, 6, 9, 13, 19)  # bins of rows: 1, 2-3, 4-5, ...
PRIOR_STRENGTH = 3.0  # observations that a cell's parent is worth
MEMORY_OBSERVATIONS = 40.0  # half the weight of what a cell saw this many observations ago is gone
LARGEST_SURPRISE = math.log(
    2.0
)  # a step further off than this counts as this far: someone else had the machine

Cell = tuple[str | int, ...]


class CostCorrection:
    """Learns the factor between measured and predicted seconds of a step. Starts at 1 for every layout.

    Args:
        lead: rows at the start of every slot group that draft nothing.
    """

    def __init__(self, lead: int = 0) -> None:
        self._lead = lead
        self._cells: dict[Cell, tuple[float, float]] = {}  # (weight, weighted sum of log ratios)
        self._kept = 0.5 ** (1.0 / MEMORY_OBSERVATIONS)

    def observe(self, layout: Layout, predicted: float, seconds: float) -> None:
        """A step in `layout` took `seconds`; the curve alone says `predicted`.

        Raises:
            ValueError: a time that is not positive.
        """
        if not (predicted > 0 and seconds > 0):
            raise ValueError(f"a step takes time: {seconds} s, predicted {predicted} s")
        ratio = math.log(seconds / predicted)
        path = self._path(layout)
        expected = self._log_factor(path)
        ratio = min(max(ratio, expected - LARGEST_SURPRISE), expected + LARGEST_SURPRISE)
        for depth in range(len(path) + 1):
            weight, total = self._cells.get(path[:depth], (0.0, 0.0))
            self._cells[path[:depth]] = (weight * self._kept + 1.0, total * self._kept + ratio)

    def factor(self, layout: Layout) -> float:
        """What to multiply the curve's seconds of `layout` with."""
        return math.exp(self._log_factor(self._path(layout)))

    def _log_factor(self, path: Cell) -> float:
        estimate = 0.0
        for depth in range(len(path) + 1):
            weight, total = self._cells.get(path[:depth], (0.0, 0.0))
            estimate = (total + PRIOR_STRENGTH * estimate) / (weight + PRIOR_STRENGTH)
        return estimate

    def _path(self, layout: Layout) -> Cell:
        """From the kind of step to its number of rows."""
        if layout == Layout.plain():
            return ("plain",)
        kind = "chain" if layout.chain else "slots" if layout.slot_rows else "drafts"
        return (kind, bisect_right(ROW_EDGES, layout.rows + layout.lead_rows(self._lead)))
