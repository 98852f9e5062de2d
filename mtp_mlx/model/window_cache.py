"""A sliding-window KV cache that can be rolled back.

mlx-lm's `RotatingKVCache` overwrites its oldest row with the newest, so rows past the window cannot be restored. Here
rows are stored in text order in a buffer larger than the window, so that a rejected row is removed as from an
ordinary cache. Attention gets the same rows as from mlx-lm's cache: for N query rows, the window - 1 rows before them
and the N rows themselves. The only difference is the order of the rows once the window is full (text order instead of
ring order), which changes nothing but the rounding of sums in attention. Where every bit counts, `newest_first` says
how to put them in the order of mlx-lm's ring.

`WindowCache` replaces an mlx-lm cache while a session runs; `hand_back` writes its state to the mlx-lm cache.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx
from mlx_lm.models.base import create_causal_mask
from mlx_lm.models.cache import RotatingKVCache

from mtp_mlx.errors import MTPError

ROOM = 256  # spare rows of a buffer; when they are used up, the rows still needed move to a new buffer


class WindowCache:
    """Keys and values of the last rows of the text, oldest first.

    Invariant: of the `offset` rows seen, at least the last min(offset, window - 1) are stored, so the newest pass can
    be rolled back completely.

    Args:
        inner: mlx-lm's cache, from which the rows are taken; its `keep` must be 0.

    Attributes:
        offset: rows seen, as in mlx-lm's caches.
        window: W, rows that a row sees, including itself.
        keys, values: [B, H_kv, C, D] buffers, or None before the first row.
    """

    def __init__(self, inner: RotatingKVCache) -> None:
        self.inner = inner
        self.offset, self.window = int(inner.offset), int(inner.max_size)
        self.keys: Any = None
        self.values: Any = None
        self._end = 0  # rows of the buffers in use; the last one has position offset - 1
        self._origin = 0  # a position that mlx-lm keeps in the first place of its ring
        if inner.keys is not None:
            index = int(inner.state[-1])
            self._origin = self.offset - min(index, self.window)
            self.keys = _in_order_of_text(inner.keys, index, self.offset)
            self.values = _in_order_of_text(inner.values, index, self.offset)
            self._end = self.keys.shape[2]

    @property
    def history(self) -> int:
        """How many stored rows the next pass may see."""
        return min(self._end, self.window - 1)

    @property
    def end(self) -> int:
        """Rows of the buffers in use."""
        return self._end

    @property
    def state(self) -> tuple[Any, Any]:
        """The arrays to evaluate."""
        return self.keys, self.values

    @property
    def nbytes(self) -> int:
        """Size of the buffers, in bytes."""
        return 0 if self.keys is None else int(self.keys.nbytes + self.values.nbytes)

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Stores N rows; returns `history` earlier rows followed by these, [B, H_kv, history + N, D]."""
        count, history, end = keys.shape[2], self.history, self._end
        if self.keys is None:
            self.keys, self.values = _with_room(keys), _with_room(values)
        elif end + count > self.keys.shape[2] or end - history > 2 * ROOM:  # full, or a long prompt's rows
            first = end - history
            moved = (
                _with_room(mx.concatenate([self.keys[..., first:end, :], keys], axis=2)),
                _with_room(mx.concatenate([self.values[..., first:end, :], values], axis=2)),
            )
            (self.keys, self.values), end = moved, history
        else:
            self.keys[..., end : end + count, :] = keys
            self.values[..., end : end + count, :] = values
        self._end = end + count
        self.offset += count
        seen = slice(end - history, end + count)
        return self.keys[..., seen, :], self.values[..., seen, :]

    def keys_and_values(self) -> Any:
        """Refuses what some models call for layers that read the last cache again.

        Raises:
            MTPError: always. mlx-lm counts the positions of such layers from the rows that a cache returns, so in a
                full window they depend on how many rows a pass has.
        """
        raise MTPError(
            "this model has layers that read the last layer's cache again, which a rotating cache does not allow: "
            "make the cache without `max_kv_size`"
        )

    def straighten(self) -> None:
        """Call after a pass over several rows of a prompt: mlx-lm's ring then starts anew behind them."""
        self._origin = self.offset if self.offset >= self.window else 0

    def newest_first(self, position: int) -> int:
        """How many of the newest rows come before the others in mlx-lm's ring, once the window is full.

        Args:
            position: of the newest row.
        """
        return 1 + (position - self._origin) % self.window

    def trim(self, count: int) -> int:
        """Removes the newest `count` rows, at most those of the newest pass; returns `count`.

        Raises:
            ValueError: if rows would be missing that the next row must see.
        """
        if self._end - count < min(self.offset - count, self.window - 1):
            raise ValueError(
                f"a window of {self.window} cannot remove {count} rows: the rows before them are gone"
            )
        self._end -= count
        self.offset -= count
        return count

    def make_mask(
        self, N: int, return_array: bool = False, window_size: int | None = None, most: int | None = None
    ) -> Any:
        """As mlx-lm's `make_mask`, for rows in text order.

        Args:
            N: number of query rows.
            return_array: always return an array if N > 1.
            window_size: window that the layer asks for; None for the cache's own.
            most: limit of the window, because mlx-lm lets a row see further in a pass of several rows than alone.
        """
        history = self.history
        if N == 1:
            window = min(window_size or self.window, self.window)
            return None if history + 1 <= window else mx.arange(history + 1) >= history + 1 - window
        window = window_size or self.window
        window = window if most is None else min(window, most)
        if history + N > window or return_array:
            return create_causal_mask(N, history, window_size=window)
        return "causal"

    def hand_back(self) -> RotatingKVCache:
        """The mlx-lm cache that this one replaced, with the same rows; lazily."""
        if self.keys is not None:
            self.inner.state = self._ring()
        return self.inner

    def copy(self) -> RotatingKVCache:
        """A cache of mlx-lm's with the same rows, which later rows leave alone; lazily."""
        copied = RotatingKVCache(self.window)
        if self.keys is not None:
            copied.state = self._ring()
        return copied

    def _ring(self) -> tuple[mx.array, mx.array, int, int, int, int]:
        """The state of mlx-lm's cache with the same rows."""
        count = min(self._end, self.window)
        keys, values = (buffer[..., self._end - count : self._end, :] for buffer in self.state)
        if count < min(self.offset, self.window):  # after a roll-back; the row added here is never seen
            keys, values = (mx.pad(rows, [(0, 0), (0, 0), (1, 0), (0, 0)]) for rows in (keys, values))
            count += 1
        index = count
        if count == self.window and (turn := (self.offset - self._origin) % self.window):
            keys, values, index = mx.roll(keys, turn, 2), mx.roll(values, turn, 2), turn
        keys, values = mx.contiguous(keys), mx.contiguous(values)  # without the rest of the buffers
        return keys, values, self.offset, 0, self.window, index


def _with_room(rows: mx.array) -> mx.array:
    """[B, H, N, D] -> [B, H, N + room, D], padded with zeros."""
    room = ROOM + -rows.shape[2] % ROOM
    return mx.pad(rows, [(0, 0), (0, 0), (0, room), (0, 0)])


def _in_order_of_text(ring: mx.array, index: int, offset: int) -> mx.array:
    """The rows of mlx-lm's buffer, oldest first; `index` is where its next row would go."""
    if index == ring.shape[2]:
        return ring
    if index < offset:
        return mx.concatenate([ring[..., index:, :], ring[..., :index, :]], axis=2)
    return ring[..., :index, :]
