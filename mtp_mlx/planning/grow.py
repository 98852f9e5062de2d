"""The tree of a step with a given number of rows: which drafts to verify, and where to put slots.

Rows are spent where they are worth most (design 2.7). A draft is worth the chance that the path to it is accepted.
Slots behind a row are worth the chance that the accepted path ends there, times what drafts of each depth usually
bring. Drafts are taken best-first; for every number of them, the rest of the rows goes to slots, and the best number
wins.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from itertools import accumulate

from mtp_mlx.decode.layout import Layout
from mtp_mlx.decode.policy import Proposal
from mtp_mlx.decode.tree import ROOT, DraftTree

BRANCHES_HELP = (
    1.25  # a tree's draft is right this much more often than a chain's, of which acceptances are known
)
MOST_CANDIDATES = 8
DEFAULT_CHANCE = 0.6


def merged(proposals: Sequence[Proposal]) -> Proposal:
    """One tree of all drafters' proposals. A token that several propose at a place keeps the largest chance."""
    tokens: list[int] = []
    parents: list[int] = []
    chances: list[float] = []
    sources: list[str] = []
    known: dict[tuple[int, int], int] = {}
    for proposal in proposals:
        tree, places = proposal.tree, {ROOT: ROOT}
        for node, (token, parent, chance) in enumerate(
            zip(tree.tokens, tree.parents, tree.chances, strict=True)
        ):
            key = (places[parent], token)
            place = known.setdefault(key, len(tokens))
            places[node] = place
            if place == len(tokens):
                tokens.append(token)
                parents.append(key[0])
                chances.append(chance)
                sources.append(proposal.source)
            elif chance > chances[place]:
                chances[place] = chance
    tree = DraftTree(tuple(tokens), tuple(parents), tuple(chances))
    return Proposal(proposals[0].source, tree, tuple(sources))


def spend(
    tree: DraftTree, rows: int, positions: int, worth: Sequence[float], lead: int
) -> tuple[list[int], list[int]]:
    """(nodes to verify, ascending; slots behind the pending token and behind each of them) of a step.

    Args:
        tree: the drafts at hand.
        rows: most rows of the pass, from 1.
        positions: most slots behind a row; 0 if drafts are not made from slots.
        worth: [positions] tokens that the slot of each depth usually brings, if the path ends before it.
        lead: further rows at the start of every slot group.
    """
    paths = tree.path_chances
    order = sorted(range(len(tree)), key=lambda node: (-paths[node], node))
    best: tuple[float, list[int], list[int]] | None = None
    for count in range(min(len(tree), rows - 1) + 1):
        nodes = sorted(order[:count])
        slots, brought = _slots(tree, nodes, rows - 1 - count, worth[:positions], lead)
        value = brought + sum(paths[node] for node in nodes)
        if best is None or value > best[0]:
            best = value, nodes, slots
    assert best is not None
    return best[1], best[2]


def ends_of(tree: DraftTree, nodes: Sequence[int]) -> list[float]:
    """[n + 1] the chance that the accepted path ends at the pending token or at a node, if `nodes` are verified."""
    paths = tree.path_chances
    ends = {ROOT: 1.0} | {node: paths[node] for node in nodes}
    for node in nodes:
        ends[tree.parents[node]] -= paths[node]
    return [max(chance, 0.0) for chance in ends.values()]


def _slots(
    tree: DraftTree, nodes: list[int], free: int, worth: Sequence[float], lead: int
) -> tuple[list[int], float]:
    """Slots behind every real row out of `free` rows, and the tokens that they bring."""
    chances = ends_of(tree, nodes)
    slots, brought = [0] * (1 + len(nodes)), 0.0
    if not worth:
        return slots, brought
    queue = [(-chance * worth[0], row) for row, chance in enumerate(chances)]
    heapq.heapify(queue)
    while queue and free > 0:
        gain, row = heapq.heappop(queue)
        price = 1 if slots[row] else 1 + lead
        if price > free:
            continue
        free -= price
        slots[row] += 1
        brought -= gain
        if slots[row] < len(worth):
            heapq.heappush(queue, (-chances[row] * worth[slots[row]], row))
    return slots, brought


class TreePolicy:
    """Always spends the same number of rows: on the likeliest drafts of all drafters, and on slots behind them.

    Args:
        rows: of a pass, from 2.
        positions: most positions that the model's own drafter drafts in a step; 0 without one.
        acceptance: recorded for each depth of its drafts, in a chain.
        places_slots: whether it drafts from slots, rather than after the pass.
        lead: rows at the start of a slot group that draft nothing.
    """

    def __init__(
        self, rows: int, positions: int, acceptance: Sequence[float], *, places_slots: bool, lead: int = 0
    ) -> None:
        self.max_drafts, self.own_drafts = rows - 1, positions
        self.verdict = ""
        self._rows, self._lead, self._places_slots = rows, lead, places_slots
        known = list(acceptance[:positions]) or [DEFAULT_CHANCE]
        known += known[-1:] * (positions - len(known))
        self._worth = list(
            accumulate((min(1.0, BRANCHES_HELP * value) for value in known), lambda a, b: a * b)
        )
        self._width = max(2, min(MOST_CANDIDATES, rows // 2)) if positions else 1

    def begin(self, context: int, *, branches: bool = True) -> None:
        """Nothing to plan."""

    def choose(self, proposals: Sequence[Proposal]) -> tuple[Proposal, Layout]:
        """See `Policy`."""
        both = merged(proposals)
        positions = self.own_drafts if self._places_slots else 0
        nodes, slots = spend(both.tree, self._rows, positions, self._worth, self._lead)
        chosen = both.keep(nodes)
        if not self._places_slots:
            chain = self.own_drafts
            return chosen, Layout(len(nodes), tuple(slots), chain, chosen.tree.parents, self._width)
        return chosen, Layout.tree(chosen.tree.parents, slots, self._width)

    def observe(self, proposal: Proposal, layout: Layout, tokens: Sequence[int], seconds: float) -> None:
        """Nothing to learn."""

    def interrupts_plain(self) -> bool:
        """Never: it has no plain steps."""
        return False
