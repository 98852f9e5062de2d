"""Gated LoRA: a low-rank update that acts on slot rows only (arXiv 2507.11851, section 2.2).

y = W x + gate(row) * (alpha / rank) * B (A x). The gate is a split index, because real rows come
first: nothing at all is computed on real rows, so their outputs are those of the base module bit for
bit. The update can never be merged into W; that is the point.
"""

from __future__ import annotations

import math

import mlx.core as mx
import mlx.nn as nn

from mtp_mlx.model.rows import RowContext


class LowRank(nn.Module):
    """The trained factors of one linear layer.

    Args:
        input_size: D_in of the base layer.
        output_size: D_out of the base layer.
        rank: r.
        alpha: the update is scaled by alpha / rank.
    """

    def __init__(self, input_size: int, output_size: int, rank: int, alpha: float) -> None:
        super().__init__()
        bound = 1 / math.sqrt(input_size)
        self.down = mx.random.uniform(-bound, bound, (input_size, rank))  # [D_in, r]
        self.up = mx.zeros((rank, output_size))  # [r, D_out]; zero, so an untrained adapter is the identity
        self._scale = alpha / rank

    def __call__(self, x: mx.array) -> mx.array:
        """[..., D_in] -> [..., D_out], in the dtype of x."""
        hidden = x @ self.down.astype(x.dtype)
        return self._scale * (hidden @ self.up.astype(x.dtype))


class GatedLinear(nn.Module):
    """A base `nn.Linear` or `nn.QuantizedLinear` with a low-rank update on slot rows."""

    def __init__(self, base: nn.Module, low_rank: LowRank, rows: RowContext) -> None:
        super().__init__()
        self.base = base
        self.low_rank = low_rank
        self._rows = rows

    def __call__(self, x: mx.array) -> mx.array:
        """[B, R, D_in] -> [B, R, D_out]."""
        y = self.base(x)
        n_real = self._rows.n_real
        if n_real is None or n_real >= x.shape[-2]:
            return y
        if n_real == 0:
            return y + self.low_rank(x)
        update = self.low_rank(x[..., n_real:, :])
        return mx.concatenate([y[..., :n_real, :], y[..., n_real:, :] + update], axis=-2)

    @property
    def weight(self) -> mx.array:
        """The base weight: some mlx-lm models read a projection's weight directly."""
        return self.base.weight


def linear_sizes(linear: nn.Module) -> tuple[int, int]:
    """(D_in, D_out) of a linear layer, quantised or not."""
    output_size, input_size = linear.weight.shape
    if isinstance(linear, nn.QuantizedLinear):
        input_size = input_size * 32 // linear.bits
    return int(input_size), int(output_size)
