"""Compares drafts with the text that came to be, whether they were verified or only at hand.

A draft counts once all drafts before it on its path have turned out right, which may be several steps later: so
deeper drafts are known, too, of which the step at hand verified none.

Texts differ more than one estimate for all of them can say. So each text has a drift for every drafter, in log-odds,
which is added to the chances of its drafts: a logistic regression with nothing but an offset, fitted as the text
comes by gradient steps of `DRIFT_RATE` and forgetting `DRIFT_DECAY` of itself at each.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from mtp_mlx.decode.policy import Proposal
from mtp_mlx.decode.tree import ROOT, DraftTree
from mtp_mlx.planning.acceptance import together
from mtp_mlx.planning.agreement import Kind, Path, chance_of, kinds, log_odds, paths_of, pooled
from mtp_mlx.planning.experience import Experience

LONGEST_WAIT = 32  # proposals that wait for text at most
DRIFT_RATE = 0.1  # of a gradient step; in a replay of 240 texts .2 gave blurred chances
DRIFT_DECAY = 0.02


@dataclass
class _Waiting:
    """A proposal of which the text follows a path so far.

    Attributes:
        source: its drafter.
        tree: its drafts, with the drafter's own confidences.
        odds: [n] log-odds of the drafts before agreement counts.
        kinds: [n] of the drafts.
        end: last node of the path, `ROOT` at first.
        depth: nodes of the path.
    """

    source: str
    tree: DraftTree
    odds: list[float]
    kinds: list[Kind]
    end: int = ROOT
    depth: int = 0


class Hindsight:
    """Learns acceptance from all drafts at hand.

    Args:
        experience: updated in place.
    """

    def __init__(self, experience: Experience) -> None:
        self._experience = experience
        self._waiting: list[_Waiting] = []
        self._offered: list[_Waiting] = []
        self._drift: dict[str, float] = {}

    def calibrated(self, proposals: Sequence[Proposal]) -> list[Proposal]:
        """The proposals for the next positions with the chances that their drafts have by experience.

        They are the ones that `read` compares with the text, unless it is called again before that. A draft that
        several proposals make has one chance: that of the first of them, whose draft it is if it is submitted.
        """
        trees = [proposal.tree for proposal in proposals]
        usual = [self._usual(proposal) for proposal in proposals]
        self._offered, found = [], []
        chances: dict[Path, float] = {}
        for proposal, odds, said in zip(proposals, pooled(trees, usual), kinds(proposals), strict=True):
            waiting = _Waiting(proposal.source, proposal.tree, odds, said)
            if proposal.tree.tokens:
                self._offered.append(waiting)
            paths = paths_of(proposal.tree)
            for node, path in enumerate(paths):
                if path not in chances:
                    chances[path] = self._chance(waiting, node)
            here = together(proposal.tree, [chances[path] for path in paths])
            found.append(replace(proposal, tree=replace(proposal.tree, chances=tuple(here))))
        return found

    def _usual(self, proposal: Proposal) -> list[float]:
        """[n] log-odds of drafts by their own drafter's experience, in this text."""
        drift = self._drift.get(proposal.source, 0.0)
        return [
            drift + log_odds(chance) for chance in self._experience.of(proposal.source).offer(proposal.tree)
        ]

    def spread(self, source: str, depth: int) -> list[tuple[float, float]]:
        """`AcceptanceEstimate.spread` of a drafter in this text."""
        drift = self._drift.get(source, 0.0)
        known = self._experience.of(source).spread(depth)
        return [(share, chance_of(drift + log_odds(chance))) for share, chance in known]

    def read(self, tokens: Sequence[int]) -> None:
        """Learns from the tokens that a step committed, which follow those of the step before."""
        waiting = [*self._waiting, *self._offered][-LONGEST_WAIT:]
        self._offered = []
        self._waiting = [one for one in waiting if self._goes_on(one, tokens)]

    def verified(self, proposal: Proposal, tokens: Sequence[int]) -> None:
        """Learns from the drafts that a step submitted, with the chances that `calibrated` gave them.

        Args:
            proposal: those drafts.
            tokens: that the step committed.
        """
        tree, end = proposal.tree, ROOT
        for token in tokens:
            following = [node for node, parent in enumerate(tree.parents) if parent == end]
            for node in following:
                right = tree.tokens[node] == token
                self._experience.recalibration.learn(proposal.source_of(node), tree.chances[node], right)
                if right:
                    end = node
            if end not in following:
                return

    def forget(self) -> None:
        """Drops all proposals, because other text comes next."""
        self._waiting, self._offered = [], []

    def _goes_on(self, one: _Waiting, tokens: Sequence[int]) -> bool:
        """Learns from a proposal's drafts at the positions of `tokens`; whether deeper ones may still be right."""
        known, tree = self._experience.of(one.source), one.tree
        first = tree.first_choices
        for token in tokens:
            following = [node for node, parent in enumerate(tree.parents) if parent == one.end]
            right = None
            for node in following:
                accepted = tree.tokens[node] == token
                known.learn(one.depth + 1, accepted, tree.chances[node], sibling=not first[node])
                if first[node]:
                    self._drifts(one.source, accepted - self._chance(one, node))
                self._experience.agreement.learn(one.kinds[node], one.odds[node], accepted)
                if accepted:
                    right = node
            if right is None:
                return False
            one.end, one.depth = right, one.depth + 1
        return one.end in tree.parents

    def _chance(self, one: _Waiting, node: int) -> float:
        """The chance of a draft in this text, by what the other drafters say of it."""
        odds = self._experience.agreement.odds(one.kinds[node], one.odds[node])
        return self._experience.recalibration.chance(one.source, odds)

    def _drifts(self, source: str, surprise: float) -> None:
        """One gradient step of a drafter's drift in this text."""
        drift = self._drift.get(source, 0.0)
        self._drift[source] = (1.0 - DRIFT_DECAY) * drift + DRIFT_RATE * surprise
