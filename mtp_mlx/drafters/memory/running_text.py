"""What followed each context in the running text itself, the newest occurrences first."""

from __future__ import annotations

from collections.abc import Sequence

from mtp_mlx.drafters.memory.ngrams import LONGEST, SEED, context_of, extended

MOST_SEEN = 6  # occurrences of a context that are kept, the newest ones


def contexts_of(text: Sequence[int]) -> list[int]:
    """The contexts that end a text (`ngrams.context_of`), of 1, 2, ... up to `LONGEST` tokens."""
    state, found = SEED, []
    for size in range(1, min(LONGEST, len(text)) + 1):
        state = extended(state, text[-size])
        found.append(context_of(size, state))
    return found


class RunningText:
    """A text that grows, and an index of its contexts.

    Attributes:
        tokens: the text.
    """

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self._after: dict[int, tuple[int, ...]] = {}  # context -> positions after it, the newest first

    def extend(self, tokens: Sequence[int]) -> None:
        """Appends tokens to the text."""
        text, after = self.tokens, self._after
        for token in tokens:
            end = len(text)
            for context in contexts_of(text[-LONGEST:]):
                after[context] = (end, *after.get(context, ())[: MOST_SEEN - 1])
            text.append(token)

    def followers(self, context: int) -> list[int]:
        """The tokens that followed a context, that of its newest occurrence first."""
        return [self.tokens[place] for place in self._after.get(context, ())]
