"""Drafts from text alone: the interface of such drafters, and prompt lookup, which every model has.

Prompt lookup drafts what followed the last occurrence of the newest n-gram in the text itself. It needs no forward
pass and no weights, and pays off where text repeats itself (summaries, code, quotations, loops).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from mtp_mlx.decode.tree import DraftTree

LOOKUP = "lookup"  # its name in the `drafter` argument and in statistics


class TextDrafter(Protocol):
    """Drafts for one generation without a pass, from text alone.

    Attributes:
        name: in the `drafter` argument and in statistics.
        branching: whether its drafts may have branches.
    """

    @property
    def name(self) -> str:
        """See the class."""
        ...

    @property
    def branching(self) -> bool:
        """See the class."""
        ...

    def extend(self, tokens: list[int]) -> None:
        """Appends committed tokens to the text."""
        ...

    def tree(self, most: int) -> DraftTree:
        """Up to `most` drafts for the next positions; asking changes nothing."""
        ...


class TextSource(Protocol):
    """What a model drafts with beside its own drafter (`AttachedModel.text_source`): it knows other texts.

    Attributes:
        name: of its drafters.
        named: whether the user named it; one that was found drafts where lookup does by default.
    """

    named: bool

    @property
    def name(self) -> str:
        """See the class."""
        ...

    def open(self, *, running_text: bool, branching: bool) -> TextDrafter:
        """Opens the drafter of one generation.

        Args:
            running_text: whether it drafts from the running text as well.
            branching: whether its trees may branch; otherwise they are chains.
        """
        ...

    def fingerprint(self) -> str:
        """Tells what it drafts from; processes that share a model must have the same."""
        ...

    def learn(self, prompt: Sequence[int], answer: Sequence[int]) -> None:
        """Is told of an answer that the model gave; learns it only if the user asked for that."""
        ...

    def close(self) -> int:
        """Keeps what was learnt; returns how many tokens that were in all."""
        ...


class LookupDrafter:
    """Finds the longest suffix of the text, of `longest` down to `shortest` tokens, that occurred before.

    An index maps every n-gram to the position after its last occurrence, and is extended with every new token.

    Args:
        longest, shortest: n-gram sizes to try, longest first.

    Raises:
        ValueError: if the sizes are not 1 <= shortest <= longest.
    """

    name, branching = LOOKUP, False

    def __init__(self, longest: int = 6, shortest: int = 3) -> None:
        if not 1 <= shortest <= longest:
            raise ValueError(
                f"n-gram sizes must satisfy 1 <= shortest <= longest, got {shortest} and {longest}"
            )
        self.longest = longest
        self._sizes = range(longest, shortest - 1, -1)
        self._tokens: list[int] = []
        self._after: dict[tuple[int, ...], int] = {}

    def extend(self, tokens: list[int]) -> None:
        """Appends committed tokens to the text."""
        for token in tokens:
            end = len(self._tokens)
            for size in self._sizes:
                if end >= size:
                    self._after[tuple(self._tokens[end - size : end])] = end
            self._tokens.append(token)

    def propose(self, most: int) -> tuple[list[int], int]:
        """(up to `most` drafts for the next positions, size of the n-gram that matched, or 0).

        Drafts that reach the end of the text continue with the drafts themselves, so a repeating loop is drafted in
        full.
        """
        text = self._tokens
        for size in self._sizes:
            if len(text) < size:
                continue
            start = self._after.get(tuple(text[-size:]))
            if start is None:
                continue
            period = len(text) - start
            return [text[start + offset % period] for offset in range(most)], size
        return [], 0

    def tree(self, most: int) -> DraftTree:
        """See `TextDrafter`; the longer the n-gram, the surer the drafts."""
        drafts, size = self.propose(most)
        return DraftTree.chain(drafts, [size / self.longest] * len(drafts))
