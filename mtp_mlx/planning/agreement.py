"""Whether drafters agree on a draft, and what that says of its chance.

A token that two of them draft at a place is right more often than either says, and one that another drafter speaks
against is right less often. What each says is a number in log-odds, and drafts that several make have the mean of
theirs. How far that is from what comes to be is learnt by logistic regression, for every drafter and answer of the
others, by gradient steps over all texts.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from mtp_mlx.decode.policy import Proposal
from mtp_mlx.decode.tree import ROOT, DraftTree
from mtp_mlx.planning.acceptance import FLOOR

ALONE, AGREED, DISPUTED = range(3)
RATE, SLOPE_RATE = 0.03, 0.01  # of a gradient step

Path = tuple[int, ...]


class Agreement:
    """The chances of drafts by their log-odds, their drafter, and what the other drafters say; unchanged at first."""

    def __init__(self) -> None:
        self._learnt: dict[tuple[str, int], tuple[float, float]] = {}  # (offset, slope beyond 1)

    def chance(self, source: str, state: int, odds: float) -> float:
        """Of a draft of `source` in `state` (ALONE, AGREED or DISPUTED) that has these log-odds so far."""
        offset, slope = self._learnt.get((source, state), (0.0, 0.0))
        return chance_of(offset + (1.0 + slope) * odds)

    def learn(self, source: str, state: int, odds: float, surprise: float) -> None:
        """One gradient step; `surprise` is whether the draft was right, less the chance that it was given."""
        offset, slope = self._learnt.get((source, state), (0.0, 0.0))
        self._learnt[source, state] = offset + RATE * surprise, slope + SLOPE_RATE * surprise * odds


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
