"""Attention of a block over the cached prefix: by a kernel where it pays, or every exact row as if alone.

mlx-lm's attention modules call `scaled_dot_product_attention`, a name in their own module. While an attached
model that needs it lives, that name is a function which looks at the cache it is given: only a `BlockCache` is
treated, every other call goes to mlx-lm's function unchanged.
"""

from __future__ import annotations

import sys
from collections import Counter
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_map
from mlx_lm.models import base
from mlx_lm.models.cache import KVCache, QuantizedKVCache

from mtp_mlx.model.cache import BlockCache
from mtp_mlx.model.rows import RowContext
from mtp_mlx.model.window_cache import WindowCache

NAME = "scaled_dot_product_attention"
_users: Counter[str] = Counter()  # attached models per module name


def scaled_dot_product_attention(
    queries: mx.array,
    keys: Any,
    values: Any,
    cache: Any,
    scale: float,
    mask: Any,
    sinks: mx.array | None = None,
) -> mx.array:
    """As `mlx_lm.models.base.scaled_dot_product_attention`; queries [B, H_q, R, D] -> [B, H_q, R, D]."""
    if isinstance(cache, BlockCache):
        if cache.rows.n_exact and queries.shape[2] > 1:
            return _rows_alone(queries, keys, values, cache, scale, mask, sinks)
        out = None if sinks is not None else _by_kernel(queries, cache.inner, cache.rows, scale)
        if out is not None:
            return out
    return base.scaled_dot_product_attention(
        queries, keys, values, cache=cache, scale=scale, mask=mask, sinks=sinks
    )


def _by_kernel(queries: mx.array, cache: Any, rows: RowContext, scale: float) -> mx.array | None:
    """By `block_attention`, or None. The keys and values of `queries` have just been stored in `cache`."""
    known = type(cache) is KVCache or (type(cache) is QuantizedKVCache and cache.bits == 8)
    if rows.step_kernels is None or rows.windowed or not known or queries.shape[0] != 1:
        return None
    words = rows.visibility_words(queries.shape[2])
    if words is None:
        return None
    # The whole buffers and not what is in use of them: a slice would be copied.
    keys, values = tree_map(lambda buffer: buffer[0], (cache.keys, cache.values))
    out = rows.step_kernels.attempt(
        "block_attention", queries[0], keys, values, words, int(cache.offset), scale
    )
    return None if out is None else out[None]


def _rows_alone(
    queries: mx.array, keys: Any, values: Any, cache: BlockCache, scale: float, mask: Any, sinks: Any
) -> mx.array:
    """The exact rows one at a time over the keys up to their own, as plain decoding would; then the others.

    Exact rows come first and see all that lies before them, so row i of n sees all but the last R - 1 - i keys:
    no mask, as in plain decoding, unless a sliding window hides some of them.
    """
    n_rows, n_exact = queries.shape[2], cache.rows.n_exact
    window = cache.inner.window if isinstance(cache.inner, WindowCache) else None
    cached = (int(cache.offset) if window is None else keys.shape[2]) - n_rows
    outputs = []
    hides = cache.rows.windowed and isinstance(mask, mx.array)
    for row in range(n_exact):
        last = cached + row + 1
        seen = slice(0 if window is None else max(0, last - window), last)
        outputs.append(
            base.scaled_dot_product_attention(
                queries[:, :, row : row + 1],
                tree_map(lambda array: array[..., seen, :], keys),  # noqa: B023, called at once
                tree_map(lambda array: array[..., seen, :], values),  # noqa: B023
                cache=cache,
                scale=scale,
                mask=mask[..., row : row + 1, seen] if hides else None,
                sinks=sinks,
            )
        )
    if n_exact < n_rows:
        rest: Any = (
            mask if isinstance(mask, str) else mask[..., n_exact:, :]
        )  # "causal" counts from the last row
        outputs.append(
            base.scaled_dot_product_attention(
                queries[:, :, n_exact:], keys, values, cache=cache, scale=scale, mask=rest, sinks=sinks
            )
        )
    return mx.concatenate(outputs, axis=2)


# --- putting it in place ------------------------------------------------------------------------------------


def hookable(trunk: nn.Module) -> set[str]:
    """Names of the Python modules of `trunk`'s classes that look for mlx-lm's attention function."""
    modules = {type(module).__module__ for _, module in trunk.named_modules()}
    theirs = (base.scaled_dot_product_attention, scaled_dot_product_attention)
    return {name for name in modules if getattr(sys.modules.get(name), NAME, None) in theirs}


def install(trunk: nn.Module) -> set[str]:
    """Puts our function where the model's code looks for mlx-lm's; returns what `remove` needs."""
    names = hookable(trunk)
    for name in names:
        _users[name] += 1
        setattr(sys.modules[name], NAME, scaled_dot_product_attention)
    return names


def remove(names: set[str]) -> None:
    """Takes one model's claim back; the last one restores mlx-lm's function."""
    for name in names:
        _users[name] -= 1
        if _users[name] <= 0:
            del _users[name]
            setattr(sys.modules[name], NAME, base.scaled_dot_product_attention)
