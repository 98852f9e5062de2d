"""A KV cache of limited size that keeps the first rows of the text, as mlx-lm's `max_kv_size` makes it, rolled back.

mlx-lm's `RotatingKVCache(max_size=M, keep=K)` writes every further row over the oldest but the first K. So a row of
decoding at position t sees all rows as long as there are at most M, and then the first K and the last M - K, itself
among them. Rows of a prompt that are read together see what mlx-lm's masks say, which is not the same: there, the
first rows leave the window as any others. Such passes are therefore run by mlx-lm's own cache.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx
from mlx_lm.models.cache import RotatingKVCache

from mtp_mlx.errors import MTPError
from mtp_mlx.model.window_cache import WindowCache

SMALLEST = 5  # rows: mlx-lm keeps the first 4, and one more must be there to be written over
UNLIMITED = "max_kv_size has no effect: this model makes caches of its own (nor has it in mlx-lm)"


class KeepingCache(WindowCache):
    """Keys and values of the first K rows of the text and of the last ones, oldest first.

    Invariant: at least the last min(offset, M - K - 1) rows are stored, and all rows while there are fewer than M.

    Args:
        inner: mlx-lm's cache, from which the rows are taken.

    Attributes:
        keep: K, rows at the beginning of the text that stay; fewer than M.
    """

    def __init__(self, inner: RotatingKVCache) -> None:
        self.keep = int(inner.keep)
        self._load(inner)

    def _load(self, inner: RotatingKVCache) -> None:
        """Takes the rows of mlx-lm's cache."""
        self.inner, self.offset, self.window = inner, int(inner.offset), int(inner.max_size)
        self.keys = self.values = None
        self._end = self._origin = 0
        self._first: tuple[Any, Any] | None = None  # [B, H_kv, K, D] each, once rows of the text are missing
        if inner.keys is None:
            return
        index = int(inner.state[-1])
        keys, values = (_in_order_of_text(ring, index, self) for ring in (inner.keys, inner.values))
        if keys.shape[2] < self.offset:
            self._first = keys[..., : self.keep, :], values[..., : self.keep, :]
            keys, values = keys[..., self.keep :, :], values[..., self.keep :, :]
        self.keys, self.values, self._end = keys, values, int(keys.shape[2])

    @property
    def state(self) -> tuple[Any, ...]:
        """The arrays to evaluate."""
        return self.keys, self.values, *(self._first or ())

    @property
    def nbytes(self) -> int:
        """Size of the buffers, in bytes."""
        return super().nbytes + sum(int(rows.nbytes) for rows in self._first or ())

    def _recent(self, count: int) -> int | None:
        """How many rows before a pass of `count` its rows see besides the first K; None if they see all of them."""
        if self.offset + count <= self.window or self.offset < self.keep:
            return None
        return min(self.offset - self.keep, self.window - self.keep - 1)

    def _seen(self, count: int) -> mx.array:
        """[C] int32 positions of the rows before a pass of `count` that `update_and_fetch` returns."""
        recent = self._recent(count)
        if recent is None:
            return mx.arange(self.offset)
        return mx.concatenate([mx.arange(self.keep), mx.arange(self.offset - recent, self.offset)])

    # --- decoding -------------------------------------------------------------------------------------------

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Stores N rows; returns the earlier ones that any of them sees, followed by these, [B, H_kv, C + N, D]."""
        count, recent = keys.shape[2], self._recent(keys.shape[2])
        if (
            self._first is None and self._end == self.offset >= self.keep
        ):  # and never rolled back from here on
            if self.offset + count > self.window:
                self._first = self.keys[..., : self.keep, :], self.values[..., : self.keep, :]
        before = self.offset
        super().update_and_fetch(keys, values)
        start = self._end - count - (before if recent is None else recent)
        found = self.keys[..., start : self._end, :], self.values[..., start : self._end, :]
        if recent is None:
            return found
        assert self._first is not None
        return (
            mx.concatenate([self._first[0], found[0]], axis=2),
            mx.concatenate([self._first[1], found[1]], axis=2),
        )

    def trim(self, count: int) -> int:
        """Removes the newest `count` rows, at most those of the newest pass; returns `count`.

        Raises:
            ValueError: if rows would be missing that the next row must see.
        """
        if self._end != self.offset and self._end - count < self.window - self.keep - 1:
            raise ValueError(
                f"a cache of {self.window} rows cannot remove {count}: the rows before them are gone"
            )
        self._end -= count
        self.offset -= count
        return count

    def step_mask(
        self,
        count: int,
        visibility: mx.array | None,
        positions: mx.array | None,
        return_array: bool,
        window_size: int | None,
    ) -> Any:
        """Mask of `count` rows of decoding over the rows that `update_and_fetch` will return.

        Args:
            visibility: [N, N] bool, which of them each sees; None for causal.
            positions: [N] int of the rows; None if they go on where the cache ends.
            return_array: always return an array if N > 1.
            window_size: that the layer asks for.

        Raises:
            MTPError: if the layer has a window of its own.
        """
        if window_size is not None and window_size < self.window:
            raise MTPError(
                "this model has layers with a window of their own, which a cache of limited size does not support: "
                "leave `max_kv_size` out"
            )
        if visibility is None and (count == 1 or self.offset + count <= self.window) and not return_array:
            return None if count == 1 else "causal"
        own = mx.arange(self.offset, self.offset + count) if positions is None else positions
        sees = mx.tril(mx.ones((count, count), dtype=mx.bool_)) if visibility is None else visibility
        seen = self._seen(count).astype(own.dtype)
        place = mx.concatenate([seen, own])[None]
        near = (place < self.keep) | (place > own[:, None] - (self.window - self.keep))
        return near & mx.concatenate([mx.ones((count, seen.size), dtype=mx.bool_), sees], axis=1)

    # --- prompts --------------------------------------------------------------------------------------------

    def prompt_mask(self, count: int, return_array: bool, window_size: int | None) -> Any:
        """mlx-lm's mask of `count` rows of a prompt."""
        self.inner.offset = self.offset
        return self.inner.make_mask(count, window_size=window_size, return_array=return_array)

    def read(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Stores several rows of a prompt, and returns what mlx-lm's cache returns for them."""
        found = self.hand_back().update_and_fetch(keys, values)
        self._load(self.inner)
        return found

    def hand_back(self) -> RotatingKVCache:
        """The mlx-lm cache that this one replaced, with the same rows; lazily."""
        if self.keys is None:
            return self.inner
        if self._end == self.offset <= self.window:
            keys, values = (mx.contiguous(buffer[..., : self._end, :]) for buffer in (self.keys, self.values))
        else:
            keys, values = (self._handed(part) for part in (0, 1))
        self.inner.state = (keys, values, self.offset, self.keep, self.window, int(keys.shape[2]))
        return self.inner

    def _handed(self, part: int) -> mx.array:
        """[B, H_kv, M, D] rows of keys (0) or values (1) in a full ring that begins with the oldest row."""
        buffer = (self.keys, self.values)[part]
        first = buffer[..., : self.keep, :] if self._first is None else self._first[part]
        wanted = self.window - self.keep
        rows = buffer[..., max(0, self._end - wanted) : self._end, :]
        if rows.shape[2] < wanted:  # after a roll-back; the row added here is never seen
            rows = mx.pad(rows, [(0, 0), (0, 0), (wanted - rows.shape[2], 0), (0, 0)])
        return mx.concatenate([first, rows], axis=2)


def _in_order_of_text(ring: mx.array, index: int, cache: KeepingCache) -> mx.array:
    """The rows of mlx-lm's buffer: the first ones, then the others, oldest first; `index` is where its next goes."""
    if index == ring.shape[2]:
        return ring
    if index < cache.offset:
        return mx.concatenate(
            [ring[..., : cache.keep, :], ring[..., index:, :], ring[..., cache.keep : index, :]], axis=2
        )
    return ring[..., :index, :]
