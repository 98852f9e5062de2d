"""Drafts what followed the same words before, in the running text or in the memory's file.

The chance of a token is a mixture over contexts of 1 to `LONGEST` tokens, the longest first: a context with C
observations of K different tokens takes the share C / (C + `DOUBT` K) of what the longer ones left (Witten and Bell
1991, method C for `DOUBT` 1). The running text counts like a file in which its newest occurrence of a context was
seen `NEWEST` times, and each one before it less.

Contract: a token with an id that the model has no row for is never drafted, whatever a file says.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from typing import NamedTuple

from mtp_mlx.decode.tree import ROOT, DraftTree
from mtp_mlx.drafters.memory.memory_file import MemoryFile
from mtp_mlx.drafters.memory.ngrams import LONGEST, OTHERS
from mtp_mlx.drafters.memory.running_text import RunningText, contexts_of

NAME = "memory"  # in the `drafter` argument and in statistics
DOUBT = 8.0
NEWEST = 64.0  # weight of the newest occurrence of a context in the running text
FADING = 0.8  # weight of each earlier occurrence, relative to the next
LEAST_CHANCE = 0.01  # of a whole chain of drafts; longer ones are not proposed
NEGLIGIBLE = 0.02  # share of shorter contexts below which they are not looked up


class MemoryDrafter:
    """Drafts for one generation.

    Args:
        memory: the file, or None for the running text alone.
        vocab_size: V; only ids below it are drafted.
        running_text: whether the running text counts.
        branching: whether drafts are trees of the likeliest paths; otherwise they are the likeliest chain.
    """

    name = NAME

    def __init__(
        self,
        memory: MemoryFile | None,
        vocab_size: int,
        *,
        running_text: bool = True,
        branching: bool = False,
    ) -> None:
        self._memory, self._vocab_size, self.branching = memory, vocab_size, branching
        self._text = RunningText() if running_text else None
        self._recent: list[int] = []

    def extend(self, tokens: Sequence[int]) -> None:
        """Appends committed tokens to the text."""
        self._recent = [*self._recent, *tokens][-LONGEST:]
        if self._text is not None:
            self._text.extend(tokens)

    def tree(self, most: int) -> DraftTree:
        """Up to `most` drafts for the next positions, each with its chance if those before it are right."""
        return self._likeliest_paths(most) if self.branching else self._likeliest_chain(most)

    def _likeliest_chain(self, most: int) -> DraftTree:
        text, path = self._recent, 1.0
        drafts: list[int] = []
        chances: list[float] = []
        while len(drafts) < most:
            token, chance = max(self.candidates(text), key=_by_chance, default=(OTHERS, 0.0))
            path *= chance
            if path < LEAST_CHANCE:
                break
            drafts.append(token)
            chances.append(chance)
            text = [*text[-LONGEST + 1 :], token]
        return DraftTree.chain(drafts, chances)

    def _likeliest_paths(self, most: int) -> DraftTree:
        """The `most` nodes whose paths are the likeliest, the likeliest first."""
        tokens: list[int] = []
        parents: list[int] = []
        chances: list[float] = []
        queue: list[_Node] = []
        self._push(queue, self._recent, ROOT, 1.0)
        while queue and len(tokens) < most:
            node = heapq.heappop(queue)
            tokens.append(node.text[-1])
            parents.append(node.parent)
            chances.append(node.chance)
            self._push(queue, node.text, len(tokens) - 1, -node.path)
        return DraftTree(tuple(tokens), tuple(parents), tuple(chances))

    def _push(self, queue: list[_Node], text: Sequence[int], parent: int, path: float) -> None:
        """Queues what may follow a text that is right with the chance `path`."""
        for token, chance in self.candidates(text):
            if path * chance >= LEAST_CHANCE:
                longer = (*text[-LONGEST + 1 :], token)
                heapq.heappush(queue, _Node(-path * chance, parent, longer, chance))

    def candidates(self, text: Sequence[int]) -> list[tuple[int, float]]:
        """[(token, chance)] of the tokens that may follow a text of at most `LONGEST` tokens, in no order."""
        levels = []
        for context in contexts_of(text):
            counts = self._counts(context)
            if not counts:
                break  # longer contexts were not seen either
            levels.append(counts)
        left, chances = 1.0, dict[int, float]()
        for counts in reversed(levels):
            seen = sum(counts.values())
            taken = left / (seen + DOUBT * len(counts))
            for token, count in counts.items():
                chances[token] = chances.get(token, 0.0) + taken * count
            left -= taken * seen
            if left < NEGLIGIBLE:
                break
        return [pair for pair in chances.items() if pair[0] < self._vocab_size]

    def _counts(self, context: int) -> dict[int, float]:
        """{token: how often it followed a context}; `OTHERS` may be among them."""
        counts: dict[int, float] = {} if self._memory is None else dict(self._memory.followers(context))
        if self._text is not None:
            weight = NEWEST
            for token in self._text.followers(context):
                counts[token] = counts.get(token, 0.0) + weight
                weight *= FADING
        return counts


class _Node(NamedTuple):
    """A draft that waits for a place in a tree; the likeliest path comes first, and of equal ones the shallower."""

    path: float  # its chance, negative
    parent: int
    text: tuple[int, ...]  # up to `LONGEST` tokens, the draft last
    chance: float


def _by_chance(candidate: tuple[int, float]) -> float:
    return candidate[1]
