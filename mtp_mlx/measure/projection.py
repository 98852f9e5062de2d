"""The speed-up that measured acceptance would give on a cost curve, layout by layout.

A projection, not a measurement. It assumes that a draft is accepted at its depth with the recorded probability,
whatever came before; that slot rows cost what real rows cost; and that drafting itself costs `draft_cost` of a plain
step per drafted token. The layouts are those of arXiv 2507.11851 section 2.4 (see `mtp_mlx.decode.layout`) and chains
of MTP heads; "auto" is this package's planner, given the curve for its measured costs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import accumulate
from operator import mul
from typing import Any

from mtp_mlx.decode.layout import Layout
from mtp_mlx.measure.curves import CostCurve
from mtp_mlx.planning.budget import BudgetPolicy, ChainBudgetPolicy
from mtp_mlx.planning.cost import StepCost

LABEL = "projection, not a measurement"
_OUT_OF_REACH = 1e6  # cost of a row that the curve does not have: no plan contains it


@dataclass(frozen=True)
class Projection:
    """One layout on one curve.

    Attributes:
        layout: "linear", "quadratic", "heads" or "auto".
        drafts: mask slots k behind one position, or drafts of a chain of heads.
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
        return {key: round(v, 4) if isinstance(v, float) else v for key, v in asdict(self).items()}


def project(
    curve: CostCurve, acceptance: Sequence[float], heads: bool, draft_cost: float = 0.0
) -> list[Projection]:
    """Every layout with 1 to len(acceptance) drafts, then "auto".

    Args:
        curve: see `mtp_mlx.measure.curves`.
        acceptance: [depths] P(accepted | reached), each in [0, 1].
        heads: the drafts are those of MTP heads, which need no rows of their own.
        draft_cost: of drafting one token, as a share of a plain step.
    """
    found = []
    for drafts in range(1, len(acceptance) + 1):
        for name in ("heads",) if heads else ("linear", "quadratic"):
            found.append(_fixed(curve, name, list(acceptance[:drafts]), draft_cost))
    return [*found, _planned(curve, acceptance, heads, draft_cost)]


def best(projections: Sequence[Projection]) -> Projection | None:
    """The layout of the highest speed-up at the curve's dearest; None where none beats plain decoding there."""
    known = [projection for projection in projections if projection.low is not None and projection.low > 1]
    return max(known, key=lambda projection: projection.low or 0.0, default=None)


def _fixed(curve: CostCurve, name: str, acceptance: list[float], draft_cost: float) -> Projection:
    drafts = len(acceptance)
    reach = list(accumulate(acceptance, mul))  # P(at least a accepted), a from 1
    tokens = 1.0 + sum(reach)
    cost: tuple[float, float] | None = None
    if name == "linear":
        full, empty = (
            curve.cost(Layout.linear(drafts, drafts).rows),
            curve.cost(Layout.linear(0, drafts).rows),
        )
        # A step that is not accepted whole leaves no drafts; the one after it verifies none and writes one token.
        missed = 1.0 - reach[-1]
        tokens = (tokens + missed) / (1.0 + missed)
        rows = Layout.linear(drafts, drafts).rows
        if full is not None and empty is not None:
            low, high = ((f + missed * e) / (1.0 + missed) for f, e in zip(full, empty, strict=True))
            cost = (low, high)
    else:
        layout = Layout.quadratic(drafts, drafts) if name == "quadratic" else Layout.chained(drafts, drafts)
        rows, cost = layout.rows, curve.cost(layout.rows)
    if cost is None:
        return Projection(name, drafts, rows, None, None, None)
    low, high = (tokens / (each + draft_cost * drafts) for each in (cost[1], cost[0]))
    return Projection(name, drafts, rows, tokens, low, high)


def _planned(curve: CostCurve, acceptance: Sequence[float], heads: bool, draft_cost: float) -> Projection:
    """What the planner expects of itself if its measured costs were the curve's."""
    low, high = (_rate(curve, costs, acceptance, heads, draft_cost) for costs in (curve.high, curve.low))
    return Projection("auto", len(acceptance), None, None, low, high)


def _rate(
    curve: CostCurve, costs: Sequence[float], acceptance: Sequence[float], heads: bool, draft_cost: float
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
    policy = ChainBudgetPolicy if heads else BudgetPolicy
    return policy(cost, len(acceptance), list(acceptance), "").rate
