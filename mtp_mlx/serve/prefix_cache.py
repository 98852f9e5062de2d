"""What the model has read of earlier texts, for requests with the same prefix, such as the next turn of a chat.

Keys and values of all rows can be trimmed to any prefix of their text. A recurrent state cannot, nor can a sliding
window that has moved on, so copies of these are kept at some lengths, the *ends* (of messages, and of the text). The
ends of a text share its keys and values, and move on to a longer text that begins with the same tokens.

The budget counts everything. Over it, the end goes first that has not been used for longest; a text whose last end
goes is trimmed to the end before it, and a text without ends is dropped. What goes may still be on disk.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from mtp_mlx.decode.rollback import needs_copies
from mtp_mlx.errors import MTPError
from mtp_mlx.files import warn_once
from mtp_mlx.serve.prefix_files import PrefixFiles
from mtp_mlx.serve.prefix_text import End, Text, common_length, text_of

MOST_ENDS = 256
SAVE_AFTER = 5.0  # seconds without requests


class PrefixCache:
    """Prompt caches within a memory budget. Not thread-safe.

    Args:
        budget: most bytes to keep between requests; 0 keeps nothing.
        files: where texts are kept on disk, or None.

    Attributes:
        hits, reused_tokens: requests that found a prefix, and the tokens they did not have to process.
        evicted: ends dropped to stay within the budget.
    """

    def __init__(self, budget: int, files: PrefixFiles | None = None) -> None:
        self.budget, self.files = budget, files
        self._texts: list[Text] = []
        self._time = 0
        self.hits = self.reused_tokens = self.evicted = 0

    @property
    def nbytes(self) -> int:
        """Bytes in use."""
        return sum(text.nbytes for text in self._texts)

    @property
    def ends(self) -> int:
        """Number of lengths of texts from which a request can go on without trimming."""
        return sum(len(text.ends) for text in self._texts)

    def __len__(self) -> int:
        return len(self._texts)

    def wants_ends(self, cache: list[Any]) -> bool:
        """Whether states of this prompt cache should be copied at the ends of messages."""
        return self.budget > 0 and needs_copies(cache)

    def fetch(self, tokens: list[int], spare: int) -> tuple[list[Any] | None, int]:
        """A copy of the cache with the longest usable prefix, and its length; (None, 0) if there is none.

        Args:
            tokens: the prompt.
            spare: tokens at the end of the prompt that must be processed anyway: at least one, and those that
                penalties look at.
        """
        wanted = np.array(tokens[: max(0, len(tokens) - spare)], dtype=np.int64)
        length, text, end = self._longest(wanted)
        if self.files is not None:
            stored = self.files.longest(wanted, length, self.budget)
            if stored is not None:
                for end in stored.ends:
                    end.used = self._now()
                self._keep(stored)
                length, text, end = self._longest(wanted)
        if text is None or end is None:
            return None, 0
        end.used = self._now()
        self.hits += 1
        self.reused_tokens += length
        return text.cache(end, length), length

    def _longest(self, wanted: np.ndarray) -> tuple[int, Text | None, End | None]:
        """(length of the longest usable prefix, its text, the end to trim); (0, None, None) if there is none."""
        found = [
            (end.reach(common), end.used, text, end)
            for text in self._texts
            for common in (common_length(text.tokens, wanted),)
            for end in text.ends
        ]
        length, _, text, end = max(found, key=lambda one: one[:2], default=(0, 0, None, None))
        return (length, text, end) if length else (0, None, None)

    def store(
        self, tokens: Sequence[int], cache: list[Any], earlier: Iterable[tuple[int, list[Any]]] = ()
    ) -> None:
        """Keeps a cache that holds exactly `tokens` if it fits the budget; what was not used for long is evicted.

        Args:
            earlier: (length, leaves) of states at shorter lengths of the text, as `Session.copied_states` makes them.
        """
        text = text_of(tokens, cache, earlier)
        if not tokens or not text.nbytes:
            return
        # The end of the answer counts as older than those of the prompt: it is often not sent back as it was written.
        for end in (text.ends[-1], *text.ends[:-1]):
            end.used = self._now()
        while text.nbytes > self.budget and len(text.ends) > 1:
            del text.ends[0]
        if text.nbytes <= self.budget:
            self._keep(text)

    def clear(self) -> None:
        """Drop all texts in memory."""
        self._texts = []

    # --- on disk --------------------------------------------------------------------------------------------

    @property
    def save_after(self) -> float | None:
        """Seconds without requests after which `save_one` should be called; None if there is nothing to write."""
        return SAVE_AFTER if self._unsaved() else None

    def _unsaved(self) -> list[Text]:
        return [] if self.files is None else [text for text in self._texts if not text.saved]

    def save_one(self) -> None:
        """Writes one text to disk, if some are not there yet: the last used first."""
        unsaved = self._unsaved()
        if self.files is None or not unsaved:
            return
        text = max(unsaved, key=lambda one: max(end.used for end in one.ends))
        text.saved = True  # also if that fails: the next one may not
        try:
            self.files.save(text)
        except (MTPError, OSError) as error:
            warn_once("prefix files", f"texts are not kept for after a restart: {error}")

    def save_all(self) -> None:
        """Writes all texts to disk that are not there yet."""
        for _ in range(len(self._unsaved())):
            self.save_one()

    # --- bookkeeping ----------------------------------------------------------------------------------------

    def _now(self) -> int:
        self._time += 1
        return self._time

    def _keep(self, text: Text) -> None:
        """Adds a text that fits the budget by itself, in place of those whose ends are all in it."""
        ends = {end.length: end for end in text.ends}
        for other in self._texts:
            common = common_length(other.tokens, text.tokens)
            for end in other.ends:
                if end.length <= common:
                    own = ends.setdefault(end.length, end)
                    own.used = max(own.used, end.used)
            other.ends = [end for end in other.ends if end.length > common]
        reaching = max((end.length for end in ends.values() if end.trims), default=0)  # any shorter length
        text.ends = sorted(
            (end for end in ends.values() if end.length >= reaching), key=lambda end: end.length
        )
        self._texts = [*(other for other in self._texts if other.ends), text]
        while self.nbytes > self.budget or self.ends > MOST_ENDS:
            self._evict()

    def _evict(self) -> None:
        """Drops the end that has not been used for longest."""
        text = min(self._texts, key=lambda one: min(end.used for end in one.ends))
        text.ends.remove(min(text.ends, key=lambda end: end.used))
        self.evicted += 1
        if text.ends:
            text.trim()
        else:
            self._texts = [other for other in self._texts if other is not text]
