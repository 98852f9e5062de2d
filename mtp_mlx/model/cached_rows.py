"""Keys and values as a layer's cache holds them, in the order of the text, for drafters that read the model's own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import mlx.core as mx
from mlx_lm.models.cache import KVCache, QuantizedKVCache, RotatingKVCache

from mtp_mlx.model.window_cache import WindowCache


@dataclass(frozen=True)
class CachedRows:
    """The newest rows of a cache, lazily.

    Attributes:
        keys, values: [1, H_kv, K, D], oldest first; keys are rotated for their positions.
        start: absolute position of the first of them.
    """

    keys: mx.array
    values: mx.array
    start: int


def is_readable(cache: Any) -> bool:
    """Whether `cached_rows` can read a cache once a session runs on it.

    A cache of limited size that keeps the first rows cannot be read: its rows do not lie in the order of the text.
    """
    if isinstance(cache, RotatingKVCache):  # a session replaces it by a `WindowCache` or a `KeepingCache`
        return not cache.keep
    return type(cache) in (KVCache, QuantizedKVCache, WindowCache)


def cached_rows(cache: Any, most: int | None = None) -> CachedRows:
    """The newest `most` rows of a cache that holds any, all of them if None; quantised ones are dequantised.

    Args:
        cache: of a kind that `is_readable`, while a session runs.
    """
    end = cache.end if type(cache) is WindowCache else int(cache.offset)
    first = 0 if most is None else max(0, end - most)

    def rows(held: Any) -> mx.array:
        if type(cache) is QuantizedKVCache:
            weight, scales, biases = (part[..., first:end, :] for part in held)
            return mx.dequantize(weight, scales, biases, cache.group_size, cache.bits)
        return held[..., first:end, :]

    return CachedRows(rows(cache.keys), rows(cache.values), int(cache.offset) - (end - first))
