"""How likely a draft is accepted, by its depth and by the drafter's confidence, learnt while decoding.

Contract: `probability(depth, confidence)` is P(the draft at this depth equals the target's pick, given that
all earlier ones did), always inside [FLOOR, 1 - FLOOR].
Invariant: a draft counts only if it was reached: the accepted ones and the first rejected one. Drafts behind
a rejection say nothing, since they continue a text that was not written.

Estimates shrink in steps, each weighing its parent as that many observations: confidence bin -> depth ->
prior. Depths count from 1, as in "the first draft".
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence

import numpy as np

DEFAULT_PRIOR = (
    0.6  # the conditional acceptance that arXiv 2507.11851 table 1 shows at most depths is 0.6 to 0.7
)
BIN_EDGES = (0.2, 0.4, 0.6, 0.8, 0.95)  # confidence bins, finest where drafts are worth submitting
PRIOR_STRENGTH = 8.0  # observations that the prior of a depth is worth
DEPTH_STRENGTH = 12.0  # observations that a depth's estimate is worth inside one of its bins
MEMORY_OBSERVATIONS = 150.0  # half the weight of what was seen this many observations ago is gone
FLOOR = 1e-3


class AcceptanceEstimate:
    """Acceptance per depth and confidence, with a prior and exponential forgetting.

    max_depth  the longest draft
    prior      conditional acceptance per depth as an adapter records it, [<= max_depth] in [0, 1]; the last
               value stands for the depths behind it; without any, DEFAULT_PRIOR
    memory     observations of a depth after which half their weight is gone

    Raises ValueError for a depth below 1, a prior outside [0, 1] or a memory that is not positive.
    """

    def __init__(
        self, max_depth: int, prior: Sequence[float] | None = None, *, memory: float = MEMORY_OBSERVATIONS
    ) -> None:
        if max_depth < 1:
            raise ValueError(f"the longest draft must be at least 1 token, not {max_depth}")
        if memory <= 0:
            raise ValueError(f"memory must be positive, not {memory}")
        recorded = list(prior or [DEFAULT_PRIOR])[:max_depth]
        if not all(0 <= value <= 1 for value in recorded):
            raise ValueError(f"acceptance must lie in [0, 1]: {recorded}")
        self.max_depth = max_depth
        self._prior = np.array(recorded + recorded[-1:] * (max_depth - len(recorded)))  # [depth]
        self._kept = 0.5 ** (1.0 / memory)
        self._seen = np.zeros((max_depth, len(BIN_EDGES) + 1))  # [depth, bin] decayed observations
        self._accepted = np.zeros_like(self._seen)
        self._unbinned = np.zeros((max_depth, 2))  # [depth, (seen, accepted)] of drafts without a confidence

    def update(self, n_submitted: int, n_accepted: int, confidences: Sequence[float] | None = None) -> None:
        """Learn from one step: `n_submitted` drafts were verified and the first `n_accepted` of them
        accepted.

        confidences  [>= n_submitted] of the drafts, or None

        Raises ValueError when more were accepted than submitted or confidences are missing.
        """
        if not 0 <= n_accepted <= n_submitted:
            raise ValueError(f"{n_accepted} of {n_submitted} drafts cannot have been accepted")
        if confidences is not None and len(confidences) < n_submitted:
            raise ValueError(f"{len(confidences)} confidences for {n_submitted} drafts")
        n_reached = min(n_accepted + 1, n_submitted, self.max_depth)
        for index in range(n_reached):
            accepted = index < n_accepted
            self._fade(slice(index, index + 1), self._kept)
            if confidences is None:
                self._unbinned[index] += (1, accepted)
            else:
                column = bisect_right(BIN_EDGES, confidences[index])
                self._seen[index, column] += 1
                self._accepted[index, column] += accepted

    def fade(self, kept: float) -> None:
        """Keep this share, in [0, 1], of the weight of everything seen, as after a stretch without observations."""
        self._fade(slice(None), kept)

    def _fade(self, depths: slice, kept: float) -> None:
        for counts in (self._seen, self._accepted, self._unbinned):
            counts[depths] *= kept

    def probability(self, depth: int, confidence: float | None = None) -> float:
        """P(accepted at `depth` | reached), from 1; with a confidence, of a draft with that confidence.

        Depths beyond `max_depth` have the probability of the last. Raises ValueError for a depth below 1.
        """
        if depth < 1:
            raise ValueError(f"depths count from 1, not {depth}")
        index = min(depth, self.max_depth) - 1
        seen = self._seen[index].sum() + self._unbinned[index, 0]
        accepted = self._accepted[index].sum() + self._unbinned[index, 1]
        estimate = (accepted + PRIOR_STRENGTH * self._prior[index]) / (seen + PRIOR_STRENGTH)
        if confidence is not None:
            column = bisect_right(BIN_EDGES, confidence)
            weighted = self._accepted[index, column] + DEPTH_STRENGTH * estimate
            estimate = weighted / (self._seen[index, column] + DEPTH_STRENGTH)
        return float(min(max(estimate, FLOOR), 1 - FLOOR))

    def summary(self) -> list[float]:
        """[max_depth] the conditional acceptance per depth."""
        return [self.probability(depth) for depth in range(1, self.max_depth + 1)]

    def observations(self) -> list[float]:
        """[max_depth] decayed number of drafts that each depth's estimate rests on, besides the prior."""
        return (self._seen.sum(axis=1) + self._unbinned[:, 0]).tolist()
