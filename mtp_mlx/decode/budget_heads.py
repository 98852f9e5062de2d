"""The planner behind `--layout auto` for MTP heads: how many drafts to verify, and how long a chain to run after.

The decision process of `budget.py` with other moves. A chain of k heads drafts k tokens after every outcome and adds
no rows to the pass, but takes its own time for each; so a step takes the layout with the largest

    1 + E[accepted] - lambda * c(drafts, k) + h(k).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mtp_mlx.decode.budget import BudgetPolicy
from mtp_mlx.decode.layout import Layout


class HeadsBudgetPolicy(BudgetPolicy):
    """See the module. Arguments as `BudgetPolicy`, `slots` being the longest chain."""

    own = "heads"

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.chain = self._slots

    def _fullest(self, drafts: int) -> Layout:
        return Layout.chained(drafts, self._slots)

    def _held_after(self, layout: Layout) -> Sequence[int]:
        return (layout.chain,) * (layout.drafts + 1)

    def _with_slots(self, accepted: float, exact: Sequence[float]) -> tuple[float, Layout]:
        """The chain worth most behind a block that accepts so many drafts; see `BudgetPolicy._with_slots`."""
        best = (-1e9, Layout.plain())
        for chain in range(self._slots + 1):
            layout = Layout.chained(len(exact) - 1, chain)
            value = 1.0 + accepted + self._worth[chain] - self.rate * self._seconds(layout)
            if value > best[0]:
                best = (value, layout)
        return best
