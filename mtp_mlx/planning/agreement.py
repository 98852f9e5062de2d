"""Whether drafters agree on a draft, and what that says of its chance.

A token that two of them draft at a place is right more often than either says, and one that another drafter speaks
against is right less often. What each says is a number in log-odds, and drafts that several make have the mean of
theirs. How far that is from what comes to be is learnt by logistic regression over all texts, apart for every drafter
and answer of the others, and for first choices and their siblings.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from mtp_mlx.decode.policy import Proposal
from mtp_mlx.decode.tree import ROOT, DraftTree
from mtp_mlx.planning.acceptance import FLOOR

ALONE, AGREED, DISPUTED = range(3)
OFFSETS = (0.0, 0.6, -0.5)  # of the three, in log-odds, before anything is learnt
VARIANCES = (0.5, 0.1)  # of an offset and of a slope, before anything is learnt
LEARNT_CASES = 2000.0  # half-life of what is learnt, in drafts
LARGEST_ODDS = 20.0

Path = tuple[int, ...]


@dataclass(frozen=True)
class Kind:
    """Drafts whose chances are learnt together.

    Attributes:
        source: their drafter.
        state: what the others say of them: ALONE, AGREED or DISPUTED.
        first: whether they are their drafter's first choice at their place.
    """

    source: str
    state: int
    first: bool


class Regression:
    """log-odds -> offset + slope * log-odds, learnt from one draft after another.

    A Kalman filter of the logistic model: the first drafts move it most, and it never forgets so much that it knows
    less than at first.

    Args:
        offset: before anything is learnt; the slope is 1.
    """

    def __init__(self, offset: float) -> None:
        self._offset, self._slope = offset, 1.0
        self._variance = (VARIANCES[0], 0.0, VARIANCES[1])  # of the offset, of both together, of the slope
        self._kept = 0.5 ** (1.0 / LEARNT_CASES)

    def __call__(self, odds: float) -> float:
        """The log-odds by experience of a draft that has these so far."""
        return min(max(self._offset + self._slope * odds, -LARGEST_ODDS), LARGEST_ODDS)

    def learn(self, odds: float, right: bool) -> None:
        """Learns whether a draft was right."""
        said = chance_of(self(odds))
        weight = said * (1.0 - said)
        own, both, slope = self._variance
        gain = (own + both * odds, both + slope * odds)
        divisor = 1.0 + weight * (gain[0] + gain[1] * odds)
        shrink = weight / divisor
        own, both = own - shrink * gain[0] * gain[0], both - shrink * gain[0] * gain[1]
        slope -= shrink * gain[1] * gain[1]
        grown = min(1.0 / self._kept, VARIANCES[0] / own, VARIANCES[1] / slope)
        self._variance = (grown * own, grown * both, grown * slope)
        surprise = (right - said) / divisor
        self._offset += gain[0] * surprise
        self._slope += gain[1] * surprise


class Agreement:
    """What has been learnt of every kind of drafts."""

    def __init__(self) -> None:
        self._learnt: dict[Kind, Regression] = {}

    def odds(self, kind: Kind, odds: float) -> float:
        """The log-odds of a draft that has these by its drafters' own experience."""
        return self._of(kind)(odds)

    def learn(self, kind: Kind, odds: float, right: bool) -> None:
        """Learns whether a draft with these log-odds was right."""
        self._of(kind).learn(odds, right)

    def _of(self, kind: Kind) -> Regression:
        if kind not in self._learnt:
            self._learnt[kind] = Regression(OFFSETS[kind.state])
        return self._learnt[kind]


def kinds(proposals: Sequence[Proposal]) -> list[list[Kind]]:
    """The kind of each draft of each proposal."""
    return [
        [
            Kind(proposal.source, state, first)
            for state, first in zip(said, proposal.tree.first_choices, strict=True)
        ]
        for proposal, said in zip(proposals, states(proposals), strict=True)
    ]


def states(proposals: Sequence[Proposal]) -> list[list[int]]:
    """What the other drafters say of each draft of each proposal."""
    paths = [paths_of(proposal.tree) for proposal in proposals]
    drafted = [set(found) for found in paths]
    places = [{path[:-1] for path in found} for found in paths]
    answers = []
    for mine, found in enumerate(paths):
        others = [other for other in range(len(paths)) if other != mine]
        answers.append(
            [_state(path, [(drafted[other], places[other]) for other in others]) for path in found]
        )
    return answers


def _state(path: Path, others: Sequence[tuple[set[Path], set[Path]]]) -> int:
    if any(path in drafted for drafted, _ in others):
        return AGREED
    return DISPUTED if any(path[:-1] in places for _, places in others) else ALONE


def pooled(trees: Sequence[DraftTree], odds: Sequence[Sequence[float]]) -> list[list[float]]:
    """The log-odds of every draft of each tree; a draft of several trees has the mean of its log-odds there."""
    paths = [paths_of(tree) for tree in trees]
    said: dict[Path, list[float]] = {}
    for found, own in zip(paths, odds, strict=True):
        for path, value in zip(found, own, strict=True):
            said.setdefault(path, []).append(value)
    return [[sum(said[path]) / len(said[path]) for path in found] for found in paths]


def paths_of(tree: DraftTree) -> list[Path]:
    """[n] the tokens up to each draft."""
    paths: list[Path] = []
    for token, parent in zip(tree.tokens, tree.parents, strict=True):
        paths.append((*(() if parent == ROOT else paths[parent]), token))
    return paths


def log_odds(chance: float) -> float:
    """Of a chance; those of 0 and 1 are finite."""
    chance = min(max(chance, FLOOR), 1.0 - FLOOR)
    return math.log(chance / (1.0 - chance))


def chance_of(odds: float) -> float:
    """The chance that has these log-odds."""
    return 1.0 / (1.0 + math.exp(-odds))
