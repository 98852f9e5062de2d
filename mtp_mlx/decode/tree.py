"""Drafts as a tree: a token, a parent and a confidence per node.

A chain of drafts is a tree without branches. A parent comes before its children, and siblings have different tokens.
The root, which is not in the tree, is the pending token.

The pick at a position is one token, whatever the branch, because noise belongs to the position. So at most one child
of a node is right, and the accepted path is found by walking from the root (`walk`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import mlx.core as mx
import numpy as np

ROOT = -1  # parent of nodes that follow the pending token


@dataclass(frozen=True)
class DraftTree:
    """Proposed tokens for the next positions.

    Attributes:
        tokens: [n] token ids.
        parents: [n] index of each node's parent, smaller than the node's own; `ROOT` for the pending token.
        chances: [n] in [0, 1], how likely a node is right if its parent is, as the drafter estimates it.

    Raises:
        ValueError: if the lists differ in length, a parent does not come before its node, or siblings have the same
            token.
    """

    tokens: tuple[int, ...] = ()
    parents: tuple[int, ...] = ()
    chances: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if not len(self.tokens) == len(self.parents) == len(self.chances):
            raise ValueError(
                f"{len(self.tokens)} tokens, {len(self.parents)} parents and {len(self.chances)} chances"
            )
        depths_of(self.parents)
        if len(set(zip(self.parents, self.tokens, strict=True))) < len(self.tokens):
            raise ValueError("siblings must have different tokens")

    @classmethod
    def chain(cls, tokens: Sequence[int], chances: Sequence[float]) -> DraftTree:
        """A tree without branches: each token follows the one before it, nearest position first."""
        return cls(tuple(tokens), tuple(range(ROOT, len(tokens) - 1)), tuple(chances))

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def is_chain(self) -> bool:
        """Whether no node has a sibling."""
        return self.parents == tuple(range(ROOT, len(self) - 1))

    @property
    def depths(self) -> tuple[int, ...]:
        """[n] each node's distance from the pending token, from 1."""
        return depths_of(self.parents)

    @property
    def first_choices(self) -> list[bool]:
        """[n] whether a node is the likeliest that follows its parent; of equally likely ones, the first is."""
        best: dict[int, int] = {}
        for node, parent in enumerate(self.parents):
            if parent not in best or self.chances[node] > self.chances[best[parent]]:
                best[parent] = node
        return [best[parent] == node for node, parent in enumerate(self.parents)]

    @property
    def choices(self) -> list[int]:
        """[n] each node's place among those that follow its parent, from 1 for the likeliest."""
        found, before = [0] * len(self), dict.fromkeys(self.parents, 0)
        for node in sorted(range(len(self)), key=lambda node: -self.chances[node]):
            before[self.parents[node]] += 1
            found[node] = before[self.parents[node]]
        return found

    @property
    def path_chances(self) -> list[float]:
        """[n] the chance that a node and all before it on its path are right; never above its parent's."""
        found: list[float] = []
        for parent, chance in zip(self.parents, self.chances, strict=True):
            chance = min(chance, 1.0)  # a softmax in float32 can be above 1 by rounding
            found.append(chance if parent == ROOT else chance * found[parent])
        return found

    def path(self, node: int) -> list[int]:
        """The nodes from the root's child to `node`, both included; none for `ROOT`."""
        nodes = []
        while node != ROOT:
            nodes.append(node)
            node = self.parents[node]
        return nodes[::-1]

    def keep(self, nodes: Sequence[int]) -> DraftTree:
        """The tree of these nodes, in ascending order; every parent must be among them.

        Raises:
            ValueError: if a parent is missing.
        """
        places = {ROOT: ROOT} | {node: place for place, node in enumerate(nodes)}
        if any(self.parents[node] not in places for node in nodes):
            raise ValueError(f"nodes {list(nodes)} lack a parent")
        return DraftTree(
            tuple(self.tokens[node] for node in nodes),
            tuple(places[self.parents[node]] for node in nodes),
            tuple(self.chances[node] for node in nodes),
        )

    def likeliest_path(self) -> list[int]:
        """The nodes of the chain that follows the likeliest child at every node."""
        nodes: list[int] = []
        last = ROOT
        while children := [node for node, parent in enumerate(self.parents) if parent == last]:
            last = max(children, key=lambda node: self.chances[node])
            nodes.append(last)
        return nodes

    def cut(self, most: int) -> DraftTree:
        """The first `most` nodes; none if `most` is negative."""
        most = max(most, 0)
        return DraftTree(self.tokens[:most], self.parents[:most], self.chances[:most])


def depths_of(parents: Sequence[int]) -> tuple[int, ...]:
    """[n] distance of each node from the root, from 1.

    Raises:
        ValueError: if a parent does not come before its node.
    """
    depths: list[int] = []
    for node, parent in enumerate(parents):
        if not ROOT <= parent < node:
            raise ValueError(f"the parent of node {node} must come before it, not at {parent}")
        depths.append(1 if parent == ROOT else depths[parent] + 1)
    return tuple(depths)


class Walk(NamedTuple):
    """The accepted path.

    Attributes:
        accepted: int32 scalar a, number of accepted drafts.
        last: int32 scalar, real row of the last of them; 0 if none was accepted.
        path: [1 + D] int32 real rows of the pending token and of the accepted drafts, then `last` repeated.
    """

    accepted: mx.array
    last: mx.array
    path: mx.array


def walk(picks: mx.array, drafts: mx.array, parents: tuple[int, ...]) -> Walk:
    """Walks from the pending token to the child whose token equals the pick, and on from there.

    Args:
        picks: [1 + d] int32, the target's pick after each real row.
        drafts: [d] int32 token ids; siblings have different ones, so that at most one of them equals the pick.
        parents: [d] index of each draft's parent, `ROOT` for the pending token.
    """
    wrong = (picks[mx.array([parent + 1 for parent in parents])] != drafts).astype(mx.int32)  # [d]
    return path_of(mx.sum(mx.array(_ancestors(parents)) * wrong, axis=1) == 0, parents)


def path_of(accepted: mx.array, parents: tuple[int, ...]) -> Walk:
    """The path whose drafts are the accepted ones.

    Args:
        accepted: [d] whether a draft and all before it on its path are the target's picks.
        parents: [d] as in `walk`.
    """
    count = len(parents)
    rows = mx.where(accepted, mx.arange(1, 1 + count, dtype=mx.int32), 0)  # a draft comes after its ancestors
    last = mx.max(rows)
    path = mx.sort(mx.where(accepted, rows, 1 + count))[: max(depths_of(parents))]
    path = mx.concatenate([mx.zeros((1,), dtype=mx.int32), mx.minimum(path, last)])
    return Walk(mx.sum(accepted.astype(mx.int32)), last, path)


@lru_cache(maxsize=512)
def _ancestors(parents: tuple[int, ...]) -> np.ndarray:
    """[d, d] int32, 1 for each draft's ancestors and itself."""
    ancestors = np.eye(len(parents), dtype=np.int32)
    for node, parent in enumerate(parents):
        if parent != ROOT:
            ancestors[node] |= ancestors[parent]
    return ancestors
