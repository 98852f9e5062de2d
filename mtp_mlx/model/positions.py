"""Rotary embedding for rows whose positions do not count up by one.

Works for every RoPE variant mlx-lm has, because none is re-implemented: rows move to the batch axis and
their positions go in as the vector of offsets that `mx.fast.rope` accepts.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mtp_mlx.model.rows import RowContext


class PositionedRoPE(nn.Module):
    """A base RoPE module that uses the explicit positions of the pass in progress, if it has any."""

    def __init__(self, base: nn.Module, rows: RowContext) -> None:
        super().__init__()
        self.base = base
        self._rows = rows

    def __call__(self, x: mx.array, offset: int | mx.array = 0, **kwargs: Any) -> mx.array:
        """x: [B, H, R, D] -> [B, H, R, D]; `offset` is what the model passes (cache.offset)."""
        positions = self._rows.positions
        if positions is None:
            return self.base(x, offset=offset, **kwargs)
        batch, heads, rows, size = x.shape
        by_row = x.transpose(0, 2, 1, 3).reshape(batch * rows, heads, 1, size)
        flat = mx.broadcast_to(positions, (batch, rows)).reshape(-1)
        turned = self.base(by_row, offset=flat, **kwargs)
        return turned.reshape(batch, rows, heads, size).transpose(0, 2, 1, 3)
