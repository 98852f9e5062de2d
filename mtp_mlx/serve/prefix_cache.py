"""KV caches of earlier texts, for requests with the same prefix: the next turn of a chat, a shared system prompt.

Storage, lookup and eviction are mlx-lm's own `LRUPromptCache`; this adds the budget and what a Session needs.
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
    """Prompt caches within a memory budget. Not thread-safe.

    Args:
        budget: most bytes to keep between requests; 0 keeps nothing.

    Attributes:
        hits, reused_tokens: requests that found a prefix, and the tokens they did not have to process.
    """

    def __init__(self, budget: int) -> None:
        self._budget = budget
        self._store = LRUPromptCache(max_size=MOST_ENTRIES, max_bytes=budget)
        self.hits = self.reused_tokens = 0

    @property
    def nbytes(self) -> int:
        """Bytes in use."""
        return int(self._store.nbytes)

    def __len__(self) -> int:
        return len(self._store)

    def fetch(self, tokens: list[int], spare: int) -> tuple[list[Any] | None, int]:
        """A copy of the cache with the longest common prefix, and its length; (None, 0) if there is none.

        Args:
            tokens: the prompt.
            spare: tokens at the end of the prompt that must be processed anyway: at least one, and those that
                penalties look at.
        """
        usable = len(tokens) - spare
        if usable < 1 or not len(self._store):
            return None, 0
        # One token more than needed: where mlx-lm's search trims a longer entry, it leaves out the last token.
        cache, rest = self._store.fetch_nearest_cache("model", tokens[: usable + 1])
        found = usable + 1 - len(rest)
        if cache is not None and found > usable and can_trim_prompt_cache(cache):
            found -= cast(int, trim_prompt_cache(cache, found - usable))  # annotated as a list in mlx-lm
        if cache is None or not 1 <= found <= usable:
            return None, 0
        self.hits += 1
        self.reused_tokens += found
        return cache, found

    def store(self, tokens: list[int], cache: list[Any]) -> None:
        """Keep a cache that holds exactly `tokens` if it fits the budget; older entries are evicted."""
        size = sum(int(layer.nbytes) for layer in cache)
        if tokens and 0 < size <= self._budget and reusable(cache):
            self._store.insert_cache("model", list(tokens), cache)

    def clear(self) -> None:
        """Drop all entries."""
        self._store = LRUPromptCache(max_size=MOST_ENTRIES, max_bytes=self._budget)


def reusable(cache: list[Any]) -> bool:
    """Whether some layer knows how many tokens it holds, which is needed to continue from it."""
    leaves = [
        leaf for layer in cache for leaf in (layer.caches if isinstance(layer, CacheList) else (layer,))
    ]
    return any(not isinstance(leaf, ArraysCache) for leaf in leaves)
