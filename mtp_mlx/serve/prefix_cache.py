"""What the model has read of earlier texts, for requests with the same prefix, such as the next turn of a chat.

Keys and values of all rows can be trimmed to any prefix of their text. A recurrent state cannot, nor can a sliding
window that has moved on, so copies of these are kept at some lengths, the *ends* (of messages, and of the text). The
ends of a text share its keys and values, and move on to a longer text that begins with the same tokens.

The budget counts everything. Over it, the end goes first that has not been used for longest; a text whose last end
goes is trimmed to the end before it, and a text without ends is dropped.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_map
from mlx_lm.models.cache import ArraysCache, CacheList, RotatingKVCache

MOST_ENDS = 256


@dataclass
class End:
    """The state behind the first `length` tokens of a text.

    Attributes:
        leaves: by cache, what cannot be trimmed; None for keys and values of all rows.
        used: when it was last used; a running number.
        nbytes: bytes of its copies.
    """

    length: int
    leaves: list[Any]
    used: int
    nbytes: int = field(init=False)

    def __post_init__(self) -> None:
        self.nbytes = _bytes(self.leaves)

    def reach(self, common: int) -> int:
        """The longest prefix of at most `common` tokens to which this end can be trimmed; 0 if there is none."""
        if self.length <= common:
            return self.length
        return common if self.trims else 0

    @property
    def trims(self) -> bool:
        """Whether it can be trimmed to any shorter length."""
        return all(leaf is None or leaf.is_trimmable() for leaf in self.leaves)


@dataclass
class Text:
    """A text that the model has read.

    Attributes:
        tokens: [T] int64 ids.
        rows: by cache, keys and values of all T rows; None where the ends have a copy.
        parts: by layer, the number of its caches if it has a list of them, else 0.
        ends: by length; at least one.
        row_bytes: bytes of `rows`.
    """

    tokens: np.ndarray
    rows: list[Any]
    parts: list[int]
    ends: list[End]
    row_bytes: int = field(init=False)

    def __post_init__(self) -> None:
        self.row_bytes = _bytes(self.rows)

    @property
    def nbytes(self) -> int:
        """Bytes of all copies."""
        return self.row_bytes + sum(end.nbytes for end in self.ends)

    def cache(self, end: End, length: int) -> list[Any]:
        """A copy of the prompt cache of the first `length` tokens, which `end` can be trimmed to."""
        leaves = []
        for rows, kept in zip(self.rows, end.leaves, strict=True):
            leaf = copy.deepcopy(rows if kept is None else kept)
            surplus = (len(self.tokens) if kept is None else end.length) - length
            if surplus:
                leaf.trim(surplus)
            leaves.append(leaf)
        layers, left = [], iter(leaves)
        for count in self.parts:
            layers.append(CacheList(*(next(left) for _ in range(count))) if count else next(left))
        return layers

    def trim(self) -> None:
        """Trims to the last end, and frees the memory of what was behind it."""
        surplus = len(self.tokens) - self.ends[-1].length
        if not surplus:
            return
        self.tokens = self.tokens[: self.ends[-1].length]
        for leaf in self.rows:
            if leaf is not None and not leaf.empty():
                leaf.trim(surplus)
                held = (leaf.keys, leaf.values)
                leaf.keys, leaf.values = tree_map(
                    lambda rows, n=leaf.offset: mx.contiguous(rows[..., :n, :]), held
                )
                mx.eval(leaf.keys, leaf.values)
        self.row_bytes = _bytes(self.rows)


class PrefixCache:
    """Prompt caches within a memory budget. Not thread-safe.

    Args:
        budget: most bytes to keep between requests; 0 keeps nothing.

    Attributes:
        hits, reused_tokens: requests that found a prefix, and the tokens they did not have to process.
        evicted: ends dropped to stay within the budget.
    """

    def __init__(self, budget: int) -> None:
        self.budget = budget
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

    def fetch(self, tokens: list[int], spare: int) -> tuple[list[Any] | None, int]:
        """A copy of the cache with the longest usable prefix, and its length; (None, 0) if there is none.

        Args:
            tokens: the prompt.
            spare: tokens at the end of the prompt that must be processed anyway: at least one, and those that
                penalties look at.
        """
        wanted = np.array(tokens[: max(0, len(tokens) - spare)], dtype=np.int64)
        found = [
            (end.reach(common), end.used, text, end)
            for text in self._texts
            for common in (_common(text.tokens, wanted),)
            for end in text.ends
        ]
        length, _, text, end = max(found, key=lambda one: one[:2], default=(0, 0, None, None))
        if not length or text is None or end is None:
            return None, 0
        end.used = self._now()
        self.hits += 1
        self.reused_tokens += length
        return text.cache(end, length), length

    def wants_ends(self, cache: list[Any]) -> bool:
        """Whether states of this prompt cache should be copied at the ends of messages."""
        return self.budget > 0 and needs_ends(cache)

    def store(
        self, tokens: Sequence[int], cache: list[Any], earlier: Iterable[tuple[int, list[Any]]] = ()
    ) -> None:
        """Keeps a cache that holds exactly `tokens` if it fits the budget; what was not used for long is evicted.

        Args:
            earlier: (length, leaves) of states at shorter lengths of the text, as `Session.copied_states` makes them.
        """
        parts = [len(layer.caches) if isinstance(layer, CacheList) else 0 for layer in cache]
        leaves = _leaves(cache)
        if not tokens or not any(leaf.nbytes for leaf in leaves):
            return
        # The end of the answer counts as older than those of the prompt: it is often not sent back as it was written.
        last = End(len(tokens), [leaf if _is_state(leaf) else None for leaf in leaves], self._now())
        ends = [
            End(length, states, self._now()) for length, states in sorted(earlier, key=lambda one: one[0])
        ]
        rows = [None if _is_state(leaf) else leaf for leaf in leaves]
        text = Text(np.array(tokens, dtype=np.int64), rows, parts, [*ends, last])
        while text.nbytes > self.budget and len(text.ends) > 1:
            del text.ends[0]
        if text.nbytes > self.budget:
            return
        self._take_over(text)
        self._texts.append(text)
        while self.nbytes > self.budget or self.ends > MOST_ENDS:
            self._evict()

    def clear(self) -> None:
        """Drop all texts."""
        self._texts = []

    def _now(self) -> int:
        self._time += 1
        return self._time

    def _take_over(self, text: Text) -> None:
        """Moves the ends of other texts that are ends of this one too, and drops those that it does not need."""
        ends = {end.length: end for end in text.ends}
        for other in self._texts:
            common = _common(other.tokens, text.tokens)
            for end in other.ends:
                if end.length <= common:
                    own = ends.setdefault(end.length, end)
                    own.used = max(own.used, end.used)
            other.ends = [end for end in other.ends if end.length > common]
        self._texts = [other for other in self._texts if other.ends]
        text.ends = sorted(ends.values(), key=lambda end: end.length)
        reaching = [end.length for end in text.ends if end.trims]
        text.ends = [end for end in text.ends if end.length >= max(reaching, default=0)]

    def _evict(self) -> None:
        """Drops the end that has not been used for longest."""
        text = min(self._texts, key=lambda one: min(end.used for end in one.ends))
        text.ends.remove(min(text.ends, key=lambda end: end.used))
        self.evicted += 1
        if text.ends:
            text.trim()
        else:
            self._texts = [other for other in self._texts if other is not text]


def needs_ends(cache: list[Any]) -> bool:
    """Whether some layer's cache cannot always be trimmed."""
    return any(_is_state(leaf) for leaf in _leaves(cache))


def _leaves(cache: list[Any]) -> list[Any]:
    """The caches of all layers, of which some have several."""
    return [leaf for layer in cache for leaf in (layer.caches if isinstance(layer, CacheList) else (layer,))]


def _is_state(leaf: Any) -> bool:
    """Whether it may be impossible to trim: recurrent state or a sliding window."""
    return isinstance(leaf, ArraysCache | RotatingKVCache)


def _bytes(leaves: list[Any]) -> int:
    return sum(int(leaf.nbytes) for leaf in leaves if leaf is not None)


def _common(one: np.ndarray, other: np.ndarray) -> int:
    """The length of the common prefix of two texts."""
    shorter = min(len(one), len(other))
    different = np.flatnonzero(one[:shorter] != other[:shorter])
    return int(different[0]) if len(different) else shorter
