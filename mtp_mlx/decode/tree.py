"""Drafts as a tree: a token, a parent and a confidence per node.

A chain of drafts is a tree without branches; today's drafters propose only chains. A parent comes before its
children. The root, which is not in the tree, is the pending token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

ROOT = -1  # parent of nodes that follow the pending token


@dataclass(frozen=True)
class DraftTree:
    """Proposed tokens for the next positions.

    Attributes:
        tokens: [n] token ids.
        parents: [n] index of each node's parent, smaller than the node's own; `ROOT` for the pending token.
        chances: [n] in [0, 1], how likely a node is right if its parent is, as the drafter estimates it.

    Raises:
        ValueError: if the lists differ in length, or a parent does not come before its node.
    """

    tokens: tuple[int, ...] = ()
    parents: tuple[int, ...] = ()
    chances: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if not len(self.tokens) == len(self.parents) == len(self.chances):
            raise ValueError(
                f"{len(self.tokens)} tokens, {len(self.parents)} parents and {len(self.chances)} chances"
            )
        for node, parent in enumerate(self.parents):
            if not ROOT <= parent < node:
                raise ValueError(f"the parent of node {node} must come before it, not at {parent}")

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

    def depth(self, node: int) -> int:
        """The node's distance from the pending token, from 1."""
        depth = 1
        while (node := self.parents[node]) != ROOT:
            depth += 1
        return depth

    def cut(self, most: int) -> DraftTree:
        """The first `most` nodes; none if `most` is negative."""
        most = max(most, 0)
        return DraftTree(self.tokens[:most], self.parents[:most], self.chances[:most])
