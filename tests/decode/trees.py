"""Random draft trees that hold the text in some branch, and a policy that verifies any part of them."""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx
import numpy as np

from mtp_mlx.decode.drafter import Drafter, LazyDrafts, Verified
from mtp_mlx.decode.layout import Layout
from mtp_mlx.decode.policy import Proposal
from mtp_mlx.decode.tree import ROOT, depths_of
from mtp_mlx.planning.grow import merged
from tests.decode.fakes import MOST_SLOTS
from tests.tiny import VOCABULARY

NODES = 12


def random_parents(rng: np.random.Generator, count: int, deepest: int) -> list[int]:
    """Parents of a random tree of `count` nodes, none deeper than `deepest`."""
    parents, able = [], [(ROOT, 0)]  # (node, depth) of those that may have children
    for node, drawn in enumerate(rng.random(count)):
        parent, depth = able[int(drawn * len(able))]
        parents.append(parent)
        if depth + 1 < deepest:
            able.append((node, depth + 1))
    return parents


class KnowingTrees(Drafter):
    """Drafts a random tree at each position: at every node on the true path, one child is right with some chance.

    Elsewhere a node may have the token that is right at its position, but behind other tokens.

    The slot rows of the block are there as ever; only what is drafted from them is replaced.
    """

    def __init__(self, truth: Sequence[int], start: int, probability: float, seed: int) -> None:
        """truth[i] is the token at absolute position start + i."""
        rng = np.random.default_rng(seed)
        length = start + len(truth) + 2 * MOST_SLOTS + 2
        tokens, parents = np.zeros((2, length, NODES), dtype=np.int32)
        for position in range(length):
            parents[position] = random_parents(rng, NODES, MOST_SLOTS)
            tokens[position] = self._tokens(
                rng, parents[position].tolist(), position - start, truth, probability
            )
        self._tables = mx.array(tokens), mx.array(parents)

    @staticmethod
    def _tokens(
        rng: np.random.Generator, parents: list[int], newest: int, truth: Sequence[int], probability: float
    ) -> list[int]:
        """Tokens of a tree behind truth[newest]; siblings differ."""
        tokens: list[int] = []
        taken = set()
        true = {ROOT}
        wrong, chances = rng.integers(0, VOCABULARY, len(parents)).tolist(), rng.random(len(parents)).tolist()
        for node, (parent, depth) in enumerate(zip(parents, depths_of(parents), strict=True)):
            place, token = newest + depth, wrong[node]
            right = truth[place] if 0 <= place < len(truth) else -1
            hit = chances[node] < (probability if parent in true else 0.4)
            if right >= 0 and (parent, right) not in taken and hit:
                token = right
            while (parent, token) in taken or (token == right and not hit):
                token = (token + 1) % VOCABULARY
            if parent in true and token == right:
                true.add(node)
            taken.add((parent, token))
            tokens.append(token)
        return tokens

    def propose(self, verified: Verified) -> LazyDrafts:
        """See `Drafter.propose`."""
        tokens, parents = (table[verified.position] for table in self._tables)
        return LazyDrafts(tokens, mx.full((NODES,), 0.5) + 0 * verified.hidden[-1, 0], parents)


class AnyTree:
    """Verifies a random part of the proposed tree, with slots behind random rows."""

    def __init__(self, slots: int, seed: int) -> None:
        self.max_drafts, self.own_drafts, self.verdict = NODES, slots, ""
        self._rng = np.random.default_rng(seed)

    def begin(self, context: int, *, branches: bool = True) -> None:
        """Nothing to plan."""

    def choose(self, proposals: Sequence[Proposal]) -> tuple[Proposal, Layout]:
        """See `Policy`."""
        rng, both = self._rng, merged(proposals)
        nodes: set[int] = set()
        for node in range(len(both.tree)):
            parent = both.tree.parents[node]
            if (parent == ROOT or parent in nodes) and rng.random() < 0.8:
                nodes.add(node)
        chosen = both.keep(sorted(nodes))
        slots = rng.integers(0, self.own_drafts + 1, 1 + len(nodes)).tolist()
        if rng.random() < 0.7:
            slots = [max(1, count) for count in slots]
        return chosen, Layout.tree(chosen.tree.parents, slots, int(rng.integers(1, 5)))

    def observe(self, proposal: Proposal, layout: Layout, tokens: Sequence[int], seconds: float) -> None:
        """Nothing to learn."""

    def interrupts_plain(self) -> bool:
        """Never."""
        return False
