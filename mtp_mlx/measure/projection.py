"""The speed-up that measured acceptance would give on a cost curve, layout by layout.

A projection, not a measurement. It assumes that a draft is accepted with the recorded probability of its depth,
whatever came before it; that slot rows cost as much as real rows; and that a drafted token costs `draft_cost` plain
steps. Layouts are those of `mtp_mlx.decode.layout`: slots in the linear and quadratic layouts of arXiv 2507.11851
section 2.4, or, if drafts are made behind the pass, a linear one without slots. "auto" is this package's planner with
the curve in place of its measured costs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from operator import mul
from typing import Any

from mtp_mlx.decode.layout import Layout
from mtp_mlx.measure.curves import CostCurve
from mtp_mlx.measure.rows import rounded
from mtp_mlx.planning.budget import BudgetPolicy, ChainBudgetPolicy, LinearBudgetPolicy
from mtp_mlx.planning.cost import StepCost

LABEL = "projection, not a measurement"
_OUT_OF_REACH = 1e6  # cost of a row beyond the curve: no plan contains it


@dataclass(frozen=True)
class Projection:
    """One layout on one curve.

    Attributes:
        layout: "linear", "quadratic" or "auto".
        drafts: per step, at most.
        rows: of a step with all its drafts; None for "auto", whose steps differ.
        tokens_per_step: in the long run; None where the curve ends before `rows`, and for "auto".
        low, high: speed-up over plain decoding at the curve's highest and lowest cost: expected tokens over expected
            cost in the long run, so a ratio of totals. None where the curve ends.
        label: always "projection, not a measurement".
    """

    layout: str
    drafts: int
    rows: int | None
    tokens_per_step: float | None
    low: float | None
    high: float | None
    label: str = LABEL

    def to_json(self) -> dict[str, Any]:
        """Plain values, rounded."""
        return rounded(self)


def project(
    curve: CostCurve,
    acceptance: Sequence[float],
    chained: bool,
    draft_cost: float = 0.0,
    linear_only: bool = False,
) -> list[Projection]:
    """Every layout with 1 to len(acceptance) drafts, then "auto".

    Args:
        curve: see `mtp_mlx.measure.curves`.
        acceptance: [depths] P(accepted | reached), each in [0, 1].
        chained: drafts are made behind the pass and need no slot rows.
        draft_cost: cost of a drafted token, in plain steps.
        linear_only: slots can stand behind the last draft only, as of models with recurrent state.
    """
    found = []
    for count in range(1, len(acceptance) + 1):
        depths = list(acceptance[:count])
        if chained:
            found.append(_refilled("linear", curve, Layout.chained(count, count), depths, draft_cost))
        else:
            found.append(_linear_slots(curve, depths, draft_cost))
            if not linear_only:
                found.append(
                    _refilled("quadratic", curve, Layout.quadratic(count, count), depths, draft_cost)
                )
    grouped = LinearBudgetPolicy if linear_only else BudgetPolicy
    return [*found, _planned(curve, acceptance, ChainBudgetPolicy if chained else grouped, draft_cost)]


def best(projections: Sequence[Projection]) -> Projection | None:
    """The highest speed-up at the curve's highest cost; None where none beats plain decoding there."""
    known = [projection for projection in projections if projection.low is not None and projection.low > 1]
    return max(known, key=lambda projection: projection.low or 0.0, default=None)


def _refilled(
    name: str, curve: CostCurve, layout: Layout, acceptance: Sequence[float], draft_cost: float
) -> Projection:
    """A layout in which every step has all its drafts, whatever the step before accepted."""
    tokens = 1.0 + sum(accumulate(acceptance, mul))
    return _projection(name, layout, tokens, curve.cost(layout.rows), draft_cost)


def _linear_slots(curve: CostCurve, acceptance: Sequence[float], draft_cost: float) -> Projection:
    """Slots behind the last draft only: a step that is not accepted whole leaves none, and the next verifies none."""
    drafts = len(acceptance)
    layout = Layout.linear(drafts, drafts)
    reach = list(accumulate(acceptance, mul))  # P(at least a accepted), a from 1
    missed = 1.0 - reach[-1]  # steps without drafts for each step with them
    full, empty = curve.cost(layout.rows), curve.cost(Layout.linear(0, drafts).rows)
    cost = None
    if full is not None and empty is not None:
        low, high = ((f + missed * e) / (1.0 + missed) for f, e in zip(full, empty, strict=True))
        cost = (low, high)
    return _projection("linear", layout, (1.0 + sum(reach) + missed) / (1.0 + missed), cost, draft_cost)


def _projection(
    name: str, layout: Layout, tokens: float, cost: tuple[float, float] | None, draft_cost: float
) -> Projection:
    if cost is None:
        return Projection(name, layout.drafts, layout.rows, None, None, None)
    low, high = (tokens / (each + draft_cost * layout.drafts) for each in (cost[1], cost[0]))
    return Projection(name, layout.drafts, layout.rows, tokens, low, high)


def _planned(
    curve: CostCurve, acceptance: Sequence[float], planner: type[BudgetPolicy], draft_cost: float
) -> Projection:
    """What the planner would expect of itself with the curve's costs."""
    low, high = (
        _planned_speedup(curve, costs, acceptance, planner, draft_cost) for costs in (curve.high, curve.low)
    )
    return Projection("auto", len(acceptance), None, None, low, high)


def _planned_speedup(
    curve: CostCurve,
    costs: Sequence[float],
    acceptance: Sequence[float],
    planner: type[BudgetPolicy],
    draft_cost: float,
) -> float:
    rows = (*curve.rows, curve.most_rows + 1)
    seconds = (*costs, _OUT_OF_REACH)
    cost = StepCost(
        rows=rows,
        contexts=(0, 1),
        short=seconds,
        long=seconds,
        slot_rows=(1,),
        surcharge=(0.0,),
        draft=draft_cost,
        plain=(1.0, 1.0),
    )
    return planner(cost, len(acceptance), list(acceptance), "").rate
