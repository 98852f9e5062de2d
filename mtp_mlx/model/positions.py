"""Rotary embedding for rows whose positions are not consecutive.

Works for every RoPE variant of mlx-lm, because none is re-implemented: rows move to the batch axis, and their
positions are passed as the vector of offsets that `mx.fast.rope` accepts.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mtp_mlx.model.rows import RowContext


class PositionedRoPE(nn.Module):
    """A RoPE module that uses the explicit positions of the pass in progress, if there are any."""

    def __init__(self, base: nn.Module, rows: RowContext) -> None:
        super().__init__()
        self.base = base
        self._rows = rows

    def __call__(self, x: mx.array, offset: int | mx.array = 0, **kwargs: Any) -> mx.array:
        """x: [B, H, R, D] -> [B, H, R, D]; `offset` is the one the model passes (cache.offset)."""
        n_exact, n_rows = self._rows.n_exact, x.shape[2]
        if n_exact and n_rows > 1:  # as in one-row passes, with positions counting from the cache's end
            alone = [
                self.base(x[:, :, row : row + 1], offset=offset + len(self._rows.path(row)) - 1, **kwargs)
                for row in range(min(n_exact, n_rows))
            ]
            rest = [self._turned(x[:, :, n_exact:], offset, n_exact, **kwargs)] if n_exact < n_rows else []
            return mx.concatenate(alone + rest, axis=2)
        return self._turned(x, offset, 0, **kwargs)

    def _turned(self, x: mx.array, offset: int | mx.array, first: int, **kwargs: Any) -> mx.array:
        """Rotates x [B, H, R, D], which holds the pass's rows from `first` on."""
        if self._rows.positions is None:
            return self.base(x, offset=offset + first, **kwargs)
        positions = self._rows.positions[..., first:]
        batch, heads, rows, size = x.shape
        by_row = x.transpose(0, 2, 1, 3).reshape(batch * rows, heads, 1, size)
        flat = mx.broadcast_to(positions, (batch, rows)).reshape(-1)
        turned = self.base(by_row, offset=flat, **kwargs)
        return turned.reshape(batch, rows, heads, size).transpose(0, 2, 1, 3)
