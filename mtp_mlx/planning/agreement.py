"""Whether drafters agree on a draft.

A token that two of them draft at a place is right more often than either says, and one that another drafter speaks
against is right less often.

The difference is learnt for each drafter in log-odds, by the gradient steps of a logistic regression with nothing but
an offset, over all texts.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from mtp_mlx.decode.policy import Proposal
from mtp_mlx.decode.tree import ROOT, DraftTree
from mtp_mlx.planning.acceptance import FLOOR

ALONE, AGREED, DISPUTED = range(3)
RATE = 0.03  # of a gradient step

Path = tuple[int, ...]


class Agreement:
    """Offsets of drafts' log-odds by drafter and by what the other drafters say, 0 at first."""

    def __init__(self) -> None:
        self._offsets: dict[tuple[str, int], float] = {}

    def offset(self, source: str, state: int) -> float:
        """To add to the log-odds of a draft of `source` in `state` (ALONE, AGREED or DISPUTED)."""
        return self._offsets.get((source, state), 0.0)

    def learn(self, source: str, state: int, surprise: float) -> None:
        """One gradient step; `surprise` is whether the draft was right, less the chance that it was given."""
        self._offsets[source, state] = self.offset(source, state) + RATE * surprise


def states(proposals: Sequence[Proposal]) -> list[list[int]]:
    """What the other drafters say of each draft of each proposal."""
    paths = [_paths(proposal.tree) for proposal in proposals]
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


def _paths(tree: DraftTree) -> list[Path]:
    """[n] the tokens up to each draft."""
    paths: list[Path] = []
    for token, parent in zip(tree.tokens, tree.parents, strict=True):
        paths.append((*(() if parent == ROOT else paths[parent]), token))
    return paths


def shifted(chance: float, offset: float) -> float:
    """A chance whose log-odds are larger by `offset`."""
    chance = min(max(chance, FLOOR), 1.0 - FLOOR)
    return 1.0 / (1.0 + (1.0 - chance) / chance * math.exp(-offset))
