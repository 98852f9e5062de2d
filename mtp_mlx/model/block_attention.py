"""Attention of a block over the cached prefix: by a kernel where that is faster, or row by row for exact rows.

mlx-lm's attention modules call `scaled_dot_product_attention` through a name in their own Python module. While an
attached model needs it, that name refers to the function here. It handles calls with a `BlockCache` only and passes
all others to mlx-lm's function unchanged.
"""

from __future__ import annotations

import sys
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_map
from mlx_lm.models import base
from mlx_lm.models.cache import BatchKVCache, KVCache, QuantizedKVCache

from mtp_mlx.model.cache import BlockCache
from mtp_mlx.model.rows import RowContext
from mtp_mlx.model.window_cache import WindowCache

NAME = "scaled_dot_product_attention"
_users: Counter[str] = Counter()  # attached models per module name
_foreign = threading.local()  # its `calls`: see `foreign_calls`


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
    if not isinstance(cache, BlockCache) or not cache.updated:
        _foreign.calls = getattr(_foreign, "calls", 0) + 1
    if isinstance(cache, BlockCache):
        if (n_exact := _exact_rows(cache, queries.shape[2])) > 0:
            return _rows_alone(n_exact, queries, keys, values, cache, scale, mask, sinks)
        out = None
        if sinks is None and _holds(cache.inner, keys):
            out = _by_kernel(queries, cache.inner, cache.rows, scale)
        if out is not None:
            return out
    return base.scaled_dot_product_attention(
        queries, keys, values, cache=cache, scale=scale, mask=mask, sinks=sinks
    )


def _holds(cache: Any, keys: Any) -> bool:
    """Whether a cache holds as many rows as are attended to: some layers attend to those of another layer."""
    rows = (keys[0] if isinstance(keys, tuple | list) else keys).shape[2]
    if cache.keys is None:
        return False
    held = (
        cache.size() if isinstance(cache, BatchKVCache) else cache.offset
    )  # a batch has an offset per sequence
    return int(held) == rows


def _by_kernel(queries: mx.array, cache: Any, rows: RowContext, scale: float) -> mx.array | None:
    """The output of the kernel `block_attention`, or None. `cache` already holds the keys and values of `queries`."""
    known = type(cache) is KVCache or (type(cache) is QuantizedKVCache and cache.bits == 8)
    if rows.step_kernels is None or rows.windowed or not known or queries.shape[0] != 1:
        return None
    words = rows.visibility_words(queries.shape[2])
    if words is None:
        return None
    # The whole buffers, not just the rows in use: a slice would be copied.
    keys, values = tree_map(lambda buffer: buffer[0], (cache.keys, cache.values))
    out = rows.step_kernels.attempt(
        "block_attention", queries[0], keys, values, words, int(cache.offset), scale
    )
    return None if out is None else out[None]


def _exact_rows(cache: BlockCache, n_rows: int) -> int:
    """How many leading rows must be computed one by one; 0 if mlx-lm's own call gives the same bits.

    A single row over a sliding window is one of them: its keys are in another order than in mlx-lm's ring.
    """
    if n_rows > 1:
        return cache.rows.n_exact
    return int(cache.rows.exact and isinstance(cache.inner, WindowCache))


def _rows_alone(
    n_exact: int,
    queries: mx.array,
    keys: Any,
    values: Any,
    cache: BlockCache,
    scale: float,
    mask: Any,
    sinks: Any,
) -> mx.array:
    """The exact rows one at a time over the keys that they see, as in mlx-lm; then the others together.

    An exact row sees the cached keys and those of its path, which the pass has added. As in plain decoding there is
    no mask, unless a sliding window hides some of the keys.
    """
    n_rows = queries.shape[2]
    windowed = isinstance(cache.inner, WindowCache)
    cached = (keys.shape[2] if windowed else int(cache.offset)) - n_rows
    outputs = []
    hides = cache.rows.windowed and isinstance(mask, mx.array)
    for row in range(n_exact):
        seen = _seen(cache, cached, cache.rows.path(row), n_rows)
        own = mask[..., row : row + 1, :] if hides and mask.ndim > 1 else mask
        outputs.append(
            base.scaled_dot_product_attention(
                queries[:, :, row : row + 1],
                tree_map(partial(_rows_at, seen), keys),
                tree_map(partial(_rows_at, seen), values),
                cache=cache,
                scale=scale,
                mask=mx.concatenate([own[..., part] for part in seen], axis=-1) if hides else None,
                sinks=sinks,
            )
        )
    if n_exact < n_rows:
        # A mask "causal" needs no slicing: it is aligned to the last row.
        rest: Any = mask if isinstance(mask, str) else mask[..., n_exact:, :]
        outputs.append(
            base.scaled_dot_product_attention(
                queries[:, :, n_exact:], keys, values, cache=cache, scale=scale, mask=rest, sinks=sinks
            )
        )
    return mx.concatenate(outputs, axis=2)


def _seen(cache: BlockCache, cached: int, path: Sequence[int], n_rows: int) -> list[slice]:
    """Which of the keys a row sees, in the order of mlx-lm's cache.

    Args:
        cached: keys before those of the pass.
        path: rows of the pass that the row sees, itself last.
        n_rows: rows of the pass.
    """
    inner, total = cache.inner, cached + len(path)
    if not isinstance(inner, WindowCache):
        return _places(cached, path, 0, total)
    first, position = max(0, total - inner.window), int(cache.offset) - n_rows + len(path) - 1
    newest = total - inner.newest_first(position) if total - first == inner.window else first
    return _places(cached, path, newest, total) + _places(cached, path, first, newest)


def _places(cached: int, path: Sequence[int], start: int, stop: int) -> list[slice]:
    """Where rows start to stop of the text of cached rows and a path are among the keys."""
    found = [slice(start, min(stop, cached))] if start < min(stop, cached) else []
    for row in range(max(start, cached), stop):
        at = cached + path[row - cached]
        if found and found[-1].stop == at:
            found[-1] = slice(found[-1].start, at + 1)
        else:
            found.append(slice(at, at + 1))
    return found


def _rows_at(parts: list[slice], array: mx.array) -> mx.array:
    """[..., K, D] -> the rows of these parts, one after another."""
    if len(parts) == 1:
        return array[..., parts[0], :]
    return mx.concatenate([array[..., part, :] for part in parts], axis=-2)


def foreign_calls(build: Callable[[], Any]) -> int:
    """How many attention calls a forward pass makes with keys that their cache has not returned in this pass.

    Args:
        build: builds a pass of an attached model, lazily; on this thread.
    """
    before = getattr(_foreign, "calls", 0)
    build()
    return int(getattr(_foreign, "calls", 0) - before)


def hookable(trunk: nn.Module) -> set[str]:
    """Names of the Python modules of `trunk`'s classes that call mlx-lm's attention function."""
    modules = {type(module).__module__ for _, module in trunk.named_modules()}
    theirs = (base.scaled_dot_product_attention, scaled_dot_product_attention)
    return {name for name in modules if getattr(sys.modules.get(name), NAME, None) in theirs}


def install(trunk: nn.Module) -> set[str]:
    """Replaces mlx-lm's attention function in the modules of the model's code; returns their names for `remove`."""
    names = hookable(trunk)
    for name in names:
        _users[name] += 1
        setattr(sys.modules[name], NAME, scaled_dot_product_attention)
    return names


def remove(names: set[str]) -> None:
    """Undoes `install` for one model; the last such call restores mlx-lm's function."""
    for name in names:
        _users[name] -= 1
        if _users[name] <= 0:
            del _users[name]
            setattr(sys.modules[name], NAME, base.scaled_dot_product_attention)
