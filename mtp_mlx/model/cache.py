"""KV caches as a forward pass sees them: mlx-lm's own caches, with the block's visibility.

`BlockCache` is the view used in decoding; `PrefixCache` holds the base model's keys and values in two-pass training.
Neither re-implements storage.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.cache import ArraysCache, BatchKVCache, CacheList, make_prompt_cache

from mtp_mlx.errors import MTPError
from mtp_mlx.model.keeping_cache import KeepingCache
from mtp_mlx.model.rows import RowContext
from mtp_mlx.model.text_states import TextStates
from mtp_mlx.model.window_cache import WindowCache


class BlockCache:
    """A view of an mlx-lm cache whose `make_mask` returns the visibility of the pass in progress.

    Everything else (`offset`, `bits`, ...) is the inner cache's own, including `trim`, which removes rejected rows.
    `rows` describes the pass in progress.
    """

    def __init__(self, inner: Any, rows: RowContext) -> None:
        self.inner = inner
        self.rows = rows
        self.updated = False  # in the pass in progress

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> Any:
        """As the inner cache's."""
        self.updated = True
        if isinstance(self.inner, KeepingCache) and keys.shape[2] > 1 and not self.rows.is_step:
            return self.inner.read(keys, values)
        first = not self.inner.offset if isinstance(self.inner, WindowCache) else False
        found = self.inner.update_and_fetch(keys, values)
        if isinstance(self.inner, WindowCache) and keys.shape[2] > 1 and not self.rows.is_step:
            self.inner.straighten()
            if first:  # mlx-lm's ring hands these on as they are; a copy lies in memory otherwise, and BLAS rounds so
                found = keys, values
        return found

    def __setattr__(self, name: str, value: Any) -> None:
        """Some layers replace the arrays of their cache, to have those of another one evaluated with them."""
        if name in ("inner", "rows"):
            object.__setattr__(self, name, value)
        else:
            setattr(self.inner, name, value)

    def make_mask(self, N: int, return_array: bool = False, window_size: int | None = None) -> Any:
        """Mask of N query rows over (cached rows + N rows): [N, cached + N] bool, or mlx-lm's own value."""
        if isinstance(self.inner, KeepingCache):
            if N > 1 and not self.rows.is_step:
                return self.inner.prompt_mask(N, return_array, window_size)
            return self.inner.step_mask(
                N, self.rows.visibility, self.rows.positions, return_array, window_size
            )
        window = self.inner if isinstance(self.inner, WindowCache) else None
        self.rows.windowed |= window_size is not None and (window is None or window_size < window.window)
        visibility = self.rows.visibility
        if visibility is None and window is not None:
            most = window.window if self.rows.is_step else None
            return window.make_mask(N, return_array, window_size, most)
        if visibility is None:
            return self.inner.make_mask(N, return_array=return_array, window_size=window_size)
        if isinstance(self.inner, BatchKVCache):
            return self._batch_mask(N, visibility)
        offset = int(self.inner.offset)
        cached = offset
        if window is not None:
            cached, window_size = window.history, min(window_size or window.window, window.window)
        mask = mx.concatenate([mx.ones((N, cached), dtype=mx.bool_), visibility], axis=1)
        if window_size is None:
            return mask
        positions = self.rows.positions
        assert positions is not None, "explicit visibility comes with explicit positions"
        key_positions = mx.concatenate([mx.arange(offset - cached, offset, dtype=positions.dtype), positions])
        return mask & (positions[:, None] < key_positions[None] + window_size)

    def _batch_mask(self, n_rows: int, visibility: mx.array) -> mx.array:
        """[B, 1, N, cached + N] bool mask; a sequence's cached rows are those after its left padding."""
        padding = self.inner.left_padding
        own = padding[:, None] <= mx.arange(self.inner.size())  # [B, cached]
        shape = (padding.shape[0], 1, n_rows)
        before = mx.broadcast_to(own[:, None, None], (*shape, own.shape[1]))
        return mx.concatenate([before, mx.broadcast_to(visibility, (*shape, n_rows))], axis=-1)


def block_view(cache: Any, rows: RowContext) -> Any:
    """One layer's cache as passed to a forward pass; recurrent state has no visibility and is passed unchanged."""
    if isinstance(cache, CacheList):
        return CacheList(*(block_view(part, rows) for part in cache.caches))
    if isinstance(cache, ArraysCache):
        return cache
    return BlockCache(cache, rows)


def prefix_caches(model: nn.Module) -> list[Any]:
    """A `PrefixCache` or `TextStates` in place of each cache of mlx-lm's prompt cache for `model`."""

    def ours(cache: Any) -> Any:
        if isinstance(cache, CacheList):
            return CacheList(*(ours(part) for part in cache.caches))
        return TextStates(cache) if isinstance(cache, ArraysCache) else PrefixCache()

    return [ours(cache) for cache in make_prompt_cache(model)]


class PrefixCache:
    """The base model's keys and values of whole sequences, for slot rows, which are never stored themselves.

    Attributes:
        keys, values: [B, H_kv, T, D] of pass 1, or None before it.
        mask: [R, T + R] or [B, 1, R, T + R] bool, the visibility of the slot rows in pass 2; None for causal.
        repeats: how many times pass 2 repeats each sequence of the batch.
    """

    def __init__(self) -> None:
        self.keys: mx.array | None = None
        self.values: mx.array | None = None
        self.mask: mx.array | None = None
        self.repeats = 1
        self.offset = 0

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Pass 1 stores and returns its own rows; pass 2 returns the stored prefix followed by its rows."""
        if self.keys is None or self.values is None:
            self.keys, self.values = keys, values
            return keys, values
        return self._behind_prefix(self.keys, keys), self._behind_prefix(self.values, values)

    def arrays(self) -> list[mx.array]:
        """The keys and values, if there are any."""
        return [array for array in (self.keys, self.values) if array is not None]

    def _behind_prefix(self, prefix: mx.array, own: mx.array) -> mx.array:
        """[S, H, T, D] and [S * repeats, H, R, D] -> [S * repeats, H, T + R, D]."""
        prefix = mx.stop_gradient(prefix)
        if self.repeats > 1:
            prefix = mx.repeat(prefix, self.repeats, axis=0)
        return mx.concatenate([prefix, own], axis=2)

    def make_mask(self, N: int, return_array: bool = False, window_size: int | None = None) -> Any:
        """The mask: "causal" in pass 1, the slot rows' visibility in pass 2.

        Raises:
            MTPError: if the sequence is longer than the layer's sliding window, which these masks do not support.
        """
        length = N if self.keys is None else self.keys.shape[2]
        if window_size is not None and length > window_size:
            raise MTPError(
                f"the sequence has {length} tokens, more than this model's sliding window of {window_size}; "
                f"train with a `max_length` of at most {window_size}"
            )
        if self.mask is not None:
            return self.mask
        if return_array:
            return mx.tril(mx.ones((N, N), dtype=mx.bool_))
        return "causal"
