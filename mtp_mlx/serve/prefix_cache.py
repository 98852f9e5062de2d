"""Keys and values of earlier texts, for requests that begin alike: the next turn of a chat, a shared system prompt.

Storage, search and order of eviction are mlx-lm's own `LRUPromptCache`; here are the budget and what a Session needs.
"""

from __future__ import annotations

from typing import Any, cast

from mlx_lm.models.cache import (
    ArraysCache,
    CacheList,
    LRUPromptCache,
    can_trim_prompt_cache,
    trim_prompt_cache,
)

MOST_ENTRIES = 256


class PrefixCache:
    """Prompt caches within a budget. Used by one thread.

    Args:
        budget: most bytes kept between requests; 0 keeps nothing.

    Attributes:
        hits, reused_tokens: requests that found a prefix, and tokens that did not have to run again.
    """

    def __init__(self, budget: int) -> None:
        self._budget = budget
        self._store = LRUPromptCache(max_size=MOST_ENTRIES, max_bytes=budget)
        self.hits = self.reused_tokens = 0

    @property
    def nbytes(self) -> int:
        """Bytes kept."""
        return int(self._store.nbytes)

    def __len__(self) -> int:
        return len(self._store)

    def fetch(self, tokens: list[int], spare: int) -> tuple[list[Any] | None, int]:
        """A copy of the cache with the longest common prefix, and its length; (None, 0) without one.

        Args:
            tokens: the prompt.
            spare: tokens at its end that are to run in any case: one at least, and what penalties look back at.
        """
        usable = len(tokens) - spare
        if usable < 1 or not len(self._store):
            return None, 0
        # One token more than is used: mlx-lm's search leaves the last one to run where it cuts a longer entry.
        cache, rest = self._store.fetch_nearest_cache("model", tokens[: usable + 1])
        found = usable + 1 - len(rest)
        if cache is not None and found > usable and can_trim_prompt_cache(cache):
            found -= cast(int, trim_prompt_cache(cache, found - usable))  # annotated as a list there
        if cache is None or not 1 <= found <= usable:
            return None, 0
        self.hits += 1
        self.reused_tokens += found
        return cache, found

    def store(self, tokens: list[int], cache: list[Any]) -> None:
        """Keeps a cache that holds exactly `tokens`, if it fits the budget; older ones make room."""
        size = sum(int(layer.nbytes) for layer in cache)
        if tokens and 0 < size <= self._budget and reusable(cache):
            self._store.insert_cache("model", list(tokens), cache)

    def clear(self) -> None:
        """Forgets everything."""
        self._store = LRUPromptCache(max_size=MOST_ENTRIES, max_bytes=self._budget)


def reusable(cache: list[Any]) -> bool:
    """Whether some layer says how many tokens it holds, which going on from it needs."""
    leaves = [
        leaf for layer in cache for leaf in (layer.caches if isinstance(layer, CacheList) else (layer,))
    ]
    return any(not isinstance(leaf, ArraysCache) for leaf in leaves)
