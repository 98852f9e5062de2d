"""How likely a draft is to be right, given its depth, the drafter's confidence and its rank, learnt while decoding.

Contract: `probability(depth, confidence, sibling)` is P(the draft at this depth is the target's pick, given that all
drafts before it on its path were), clipped to [FLOOR, 1 - FLOOR]. A drafter's likeliest draft at a place and its
other drafts there, the siblings, are learnt apart.

`learn` takes what came to be of a draft, whether it was verified or only at hand: who learns from submitted drafts
alone says too much of the others, because the drafts that look good are submitted. For the same reason `offer` counts
the confidences of all drafts at hand, and the acceptance of a depth is the mean over these of the acceptance of their
confidence bins.

Estimates are shrunk, each weighed like a fixed number of observations: that of a bin towards the confidence times
how far acceptance has been from it at this depth, and that factor towards the one that gives the prior (for siblings,
of which no adapter records anything, towards 1). As long as nothing was offered, a bin is shrunk towards its depth,
and that towards the prior. Depths count from 1 (the first draft).
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence

import numpy as np

from mtp_mlx.decode.tree import ROOT, DraftTree

DEFAULT_PRIOR = 0.6  # at most depths of arXiv 2507.11851, table 1, conditional acceptance is 0.6 to 0.7
BIN_EDGES = (0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95)  # confidence bins
PRIOR_STRENGTH = 8.0  # weight of a depth's prior, in observations
DEPTH_STRENGTH = 12.0  # weight of a depth's estimate in each of its bins, in observations
MEMORY_OBSERVATIONS = 600.0  # half-life of an observation's weight, in observations
FLOOR = 1e-3
MOST_TOGETHER = 0.99  # largest chance of all drafts at one place together


class AcceptanceEstimate:
    """Acceptance per depth, rank and confidence, with a prior and exponential forgetting.

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
        places, bins = 2 * max_depth, len(BIN_EDGES) + 1  # a place: first the depths, then those of siblings
        self._seen = np.zeros((places, bins))  # decayed observations
        self._accepted = np.zeros_like(self._seen)
        self._expected = np.zeros(places)  # decayed sum of the confidences of observations
        self._offered = np.zeros((max_depth, bins, 2))  # [depth, bin, (drafts, confidences)] at hand

    def offer(self, tree: DraftTree) -> list[float]:
        """Counts the drafts at hand in a step, whether they are verified or not, by the chance that they are reached.

        Siblings are not counted.

        Args:
            tree: a drafter's drafts, with its confidences as chances.

        Returns:
            The `probability` of each draft. Those of one place together are at most MOST_TOGETHER.
        """
        chances: list[float] = []
        reached: list[float] = []
        for node, (depth, first) in enumerate(zip(tree.depths, tree.first_choices, strict=True)):
            parent, confidence = tree.parents[node], tree.chances[node]
            before = 1.0 if parent == ROOT else reached[parent]
            if first and depth <= self.max_depth:
                self._offered[depth - 1] *= self._kept
                self._offered[depth - 1, bisect_right(BIN_EDGES, confidence)] += (before, before * confidence)
            chances.append(self.probability(depth, confidence, sibling=not first))
            reached.append(before * chances[-1])
        return together(tree, chances)

    def learn(self, depth: int, accepted: bool, confidence: float, *, sibling: bool = False) -> None:
        """Learns whether a draft was right, all before it on its path having been.

        Drafts beyond `max_depth` are not learnt from.

        Args:
            depth: from 1.
            accepted: whether it was the target's pick.
            confidence: the drafter's, in [0, 1].
            sibling: whether the drafter had a likelier one at the same place.
        """
        if depth > self.max_depth:
            return
        place = self._place(depth, sibling)
        for counts in (self._seen, self._accepted, self._expected):
            counts[place] *= self._kept
        column = bisect_right(BIN_EDGES, confidence)
        self._seen[place, column] += 1
        self._accepted[place, column] += accepted
        self._expected[place] += confidence

    def fade(self, kept: float) -> None:
        """Scales the weight of all observations by `kept` in [0, 1], as after a stretch without observations."""
        for counts in (self._seen, self._accepted, self._expected, self._offered):
            counts *= kept

    def probability(self, depth: int, confidence: float | None = None, *, sibling: bool = False) -> float:
        """P(draft at `depth` is right | reached), given its confidence if there is one.

        Depths count from 1; those beyond `max_depth` have the probability of the last.

        Args:
            depth: from 1.
            confidence: the drafter's, in [0, 1]; needed for a sibling.
            sibling: whether the drafter has a likelier one at the same place.

        Raises:
            ValueError: if depth is below 1.
        """
        if depth < 1:
            raise ValueError(f"depths count from 1, not {depth}")
        depth = min(depth, self.max_depth)
        if sibling:
            assert confidence is not None
            estimate = self._of_sibling(self._place(depth, sibling), confidence)
        elif self._offered[depth - 1].any():
            estimate = self._of_depth(depth - 1, confidence)
        else:
            estimate = self._without_offers(depth - 1, confidence)
        return float(min(max(estimate, FLOOR), 1 - FLOOR))

    def spread(self, depth: int) -> list[tuple[float, float]]:
        """(share, P(a draft is right)) of the drafts at `depth`, from 1, by their confidence; shares add up to 1."""
        index = min(depth, self.max_depth) - 1
        if not self._offered[index].any():
            return [(1.0, self.probability(depth))]
        bins = self._bins(index, self._factor(index))
        return [(share, min(max(chance, FLOOR), 1.0 - FLOOR)) for share, chance in bins]

    def _place(self, depth: int, sibling: bool) -> int:
        return depth - 1 + sibling * self.max_depth

    def _of_sibling(self, place: int, confidence: float) -> float:
        strength = PRIOR_STRENGTH * confidence
        factor = (self._accepted[place].sum() + strength) / (self._expected[place] + strength + FLOOR)
        return self._of_bin(place, bisect_right(BIN_EDGES, confidence), factor * confidence)

    def _of_depth(self, index: int, confidence: float | None) -> float:
        """Acceptance at a confidence, or its mean over the drafts at hand."""
        factor = self._factor(index)
        if confidence is not None:
            return self._of_bin(index, bisect_right(BIN_EDGES, confidence), factor * confidence)
        return sum(weight * chance for weight, chance in self._bins(index, factor))

    def _factor(self, index: int) -> float:
        """How far acceptance at a depth has been from the confidence."""
        drafts, sums = self._offered[index].T  # [bin] each
        mean = max(sums.sum() / drafts.sum(), FLOOR)
        seen = self._accepted[index].sum() + PRIOR_STRENGTH * self._prior[index]
        return float(seen / (self._expected[index] + PRIOR_STRENGTH * mean))

    def _bins(self, index: int, factor: float) -> list[tuple[float, float]]:
        """(share of the drafts at hand, acceptance) of each confidence bin that has any."""
        drafts, sums = self._offered[index].T  # [bin] each
        shares = drafts / drafts.sum()
        return [
            (float(shares[column]), self._of_bin(index, column, factor * sums[column] / drafts[column]))
            for column in np.flatnonzero(drafts).tolist()
        ]

    def _of_bin(self, place: int, column: int, guess: float) -> float:
        """Acceptance in a confidence bin, shrunk towards `guess`."""
        guess = min(guess, 1.0)
        accepted = self._accepted[place, column] + DEPTH_STRENGTH * guess
        return float(accepted / (self._seen[place, column] + DEPTH_STRENGTH))

    def _without_offers(self, index: int, confidence: float | None) -> float:
        """Acceptance by the observations alone."""
        seen, accepted = self._seen[index].sum(), self._accepted[index].sum()
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
        return self._seen[: self.max_depth].sum(axis=1).tolist()


def together(tree: DraftTree, chances: list[float]) -> list[float]:
    """Chances that are smaller where those of one place would be more than MOST_TOGETHER."""
    sums: dict[int, float] = {}
    for parent, chance in zip(tree.parents, chances, strict=True):
        sums[parent] = sums.get(parent, 0.0) + chance
    return [
        chance * min(1.0, MOST_TOGETHER / sums[parent])
        for parent, chance in zip(tree.parents, chances, strict=True)
    ]
