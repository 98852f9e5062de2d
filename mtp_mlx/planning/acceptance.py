"""How likely a draft is to be accepted, given its depth and the drafter's confidence, learnt while decoding.

Contract: `probability(depth, confidence)` is P(the draft at this depth equals the target's pick, given that all
earlier drafts did), clipped to [FLOOR, 1 - FLOOR]. Invariant: only drafts that verification reached are counted: the
accepted ones and the first rejected one. Drafts after a rejection tell nothing, since they continue a text that was
not written.

Whoever plans submits the drafts that look good, so the verified ones say too much of the others. `offer` therefore
counts the confidences of all drafts at hand, verified or not, and the acceptance of a depth is the mean over these of
the acceptance of their confidence bins.

Estimates are shrunk, each weighed like a fixed number of observations: that of a bin towards the confidence times
how far acceptance has been from it at this depth, and that factor towards the one that gives the prior. As long as
nothing was offered, a bin is shrunk towards its depth, and that towards the prior. Depths count from 1 (the first
draft).
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence

import numpy as np

DEFAULT_PRIOR = 0.6  # at most depths of arXiv 2507.11851, table 1, conditional acceptance is 0.6 to 0.7
BIN_EDGES = (0.2, 0.4, 0.6, 0.8, 0.95)  # confidence bins, finest where drafts are worth submitting
PRIOR_STRENGTH = 8.0  # weight of a depth's prior, in observations
DEPTH_STRENGTH = 12.0  # weight of a depth's estimate in each of its bins, in observations
MEMORY_OBSERVATIONS = 150.0  # half-life of an observation's weight, in observations
FLOOR = 1e-3


class AcceptanceEstimate:
    """Acceptance per depth and confidence, with a prior and exponential forgetting.

    Args:
        max_depth: length of the longest draft, in tokens.
        prior: conditional acceptance per depth as the adapter records it, in [0, 1]; the last value also holds for
            deeper drafts. None or empty for DEFAULT_PRIOR.
        memory: half-life of a depth's observations, in observations.

    Raises:
        ValueError: if max_depth is below 1, a prior is outside [0, 1], or memory is not positive.
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
        self._expected = np.zeros(max_depth)  # [depth] decayed sum of the confidences of observations
        self._offered = np.zeros(
            (max_depth, len(BIN_EDGES) + 1, 2)
        )  # [depth, bin, (drafts, confidences)] at hand

    def offer(self, confidences: Sequence[float]) -> list[float]:
        """Counts the drafts at hand in a step, whether they are verified or not, by the chance that they are reached.

        Args:
            confidences: of the drafts, in order.

        Returns:
            The `probability` of each.
        """
        reached, chances = 1.0, []
        for index, confidence in enumerate(confidences[: self.max_depth]):
            self._offered[index] *= self._kept
            self._offered[index, bisect_right(BIN_EDGES, confidence)] += (reached, reached * confidence)
            chances.append(self.probability(index + 1, confidence))
            reached *= chances[-1]
        deeper = confidences[self.max_depth :]
        return chances + [self.probability(self.max_depth, confidence) for confidence in deeper]

    def update(self, n_submitted: int, n_accepted: int, confidences: Sequence[float] | None = None) -> None:
        """Learns from a step that verified `n_submitted` drafts and accepted the first `n_accepted`.

        Args:
            n_submitted: drafts verified.
            n_accepted: drafts accepted.
            confidences: [>= n_submitted] of the drafts, or None.

        Raises:
            ValueError: if more drafts were accepted than submitted, or there are too few confidences.
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
                self._expected[index] += confidences[index]

    def fade(self, kept: float) -> None:
        """Scales the weight of all observations by `kept` in [0, 1], as after a stretch without observations."""
        self._fade(slice(None), kept)
        self._offered *= kept

    def _fade(self, depths: slice, kept: float) -> None:
        for counts in (self._seen, self._accepted, self._unbinned, self._expected):
            counts[depths] *= kept

    def probability(self, depth: int, confidence: float | None = None) -> float:
        """P(draft at `depth` accepted | reached), given its confidence if there is one.

        Depths count from 1; those beyond `max_depth` have the probability of the last.

        Raises:
            ValueError: if depth is below 1.
        """
        if depth < 1:
            raise ValueError(f"depths count from 1, not {depth}")
        index = min(depth, self.max_depth) - 1
        estimate = self._of_depth(index, confidence) if self._offered[index].any() else None
        if estimate is None:
            estimate = self._without_offers(index, confidence)
        return float(min(max(estimate, FLOOR), 1 - FLOOR))

    def _of_depth(self, index: int, confidence: float | None) -> float:
        """Acceptance at a confidence, or its mean over the drafts at hand."""
        drafts, sums = self._offered[index].T  # [bin] each
        mean = sums.sum() / drafts.sum()
        factor = (self._accepted[index].sum() + PRIOR_STRENGTH * self._prior[index]) / (
            self._expected[index] + PRIOR_STRENGTH * max(mean, FLOOR)
        )
        if confidence is not None:
            return self._of_bin(index, bisect_right(BIN_EDGES, confidence), factor * confidence)
        rates = [
            self._of_bin(index, column, factor * total / count) if count else 0.0
            for column, (count, total) in enumerate(zip(drafts, sums, strict=True))
        ]
        return float(np.dot(drafts, rates) / drafts.sum())

    def _of_bin(self, index: int, column: int, guess: float) -> float:
        """Acceptance in a confidence bin, shrunk towards `guess`."""
        guess = min(guess, 1.0)
        accepted = self._accepted[index, column] + DEPTH_STRENGTH * guess
        return float(accepted / (self._seen[index, column] + DEPTH_STRENGTH))

    def _without_offers(self, index: int, confidence: float | None) -> float:
        """Acceptance by the observations alone."""
        seen = self._seen[index].sum() + self._unbinned[index, 0]
        accepted = self._accepted[index].sum() + self._unbinned[index, 1]
        estimate = (accepted + PRIOR_STRENGTH * self._prior[index]) / (seen + PRIOR_STRENGTH)
        if confidence is not None:
            column = bisect_right(BIN_EDGES, confidence)
            weighted = self._accepted[index, column] + DEPTH_STRENGTH * estimate
            estimate = weighted / (self._seen[index, column] + DEPTH_STRENGTH)
        return float(estimate)

    def summary(self) -> list[float]:
        """[max_depth] conditional acceptance per depth."""
        return [self.probability(depth) for depth in range(1, self.max_depth + 1)]

    def observations(self) -> list[float]:
        """[max_depth] decayed number of observations behind each depth's estimate, not counting the prior."""
        return (self._seen.sum(axis=1) + self._unbinned[:, 0]).tolist()
