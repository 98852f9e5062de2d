"""Gated LoRA: a low-rank update that acts on slot rows only (arXiv 2507.11851, section 2.2).

y = W x + gate(row) * (alpha / rank) * B (A x). The gate is a split index, because real rows come first. Nothing is
computed for real rows, so their outputs equal the base module's bit for bit. For the same reason the update cannot be
merged into W.
"""

from __future__ import annotations

import math
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn

from mtp_mlx.distributed import Peers
from mtp_mlx.model.precision import bare
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
        self._peers = Peers()

    def sum_over(self, peers: Peers) -> None:
        """Call when each process has a part of the input and the rows of `down` for it."""
        self._peers = peers

    def add_to(self, y: mx.array, x: mx.array, n_real: int) -> mx.array:
        """y plus the update of the rows from `n_real` on; an exact zero is added to the rows before.

        Args:
            y: [B, R, D_out] the base layer's output.
            x: [B, R, D_in] its input.
            n_real: first slot row.
        """
        hidden = x[..., n_real:, :] @ self.down.astype(x.dtype)  # [B, R - n_real, r]
        if not self._peers.alone:
            hidden = mx.distributed.all_sum(hidden, group=self._peers.group)
        if n_real:
            hidden = mx.pad(hidden, [(0, 0)] * (hidden.ndim - 2) + [(n_real, 0), (0, 0)])
        # One fused call: slicing and concatenating y would cost more than the update itself.
        return mx.addmm(y, hidden, self.up.astype(x.dtype), alpha=self._scale)

    def product(self) -> mx.array:
        """[D_in, D_out], what an ordinary LoRA would add to the (transposed) weight."""
        return self._scale * (self.down @ self.up)

    def kernel_arguments(self, x: mx.array, y: mx.array, n_real: int) -> tuple[Any, ...]:
        """The arguments of the kernel `gated_lora` for x [R, D_in] and y [R, D_out]."""
        return x, y, self.down.astype(x.dtype), self.up.astype(x.dtype), n_real, self._scale


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
        n_real = self._rows.first_gated
        if n_real is None or n_real >= x.shape[-2]:
            return y
        kernels = self._rows.step_kernels
        if kernels is not None and kernels.active and x.shape[0] == 1:
            slots = kernels.attempt("gated_lora", *self.low_rank.kernel_arguments(x[0], y[0], n_real))
            if slots is not None:
                return mx.concatenate([y[:, :n_real], slots[None]], axis=1)
        return self.low_rank.add_to(y, x, n_real)

    @property
    def weight(self) -> mx.array:
        """The base weight: some mlx-lm models read a projection's weight directly."""
        return cast(mx.array, bare(self.base).weight)


def linear_sizes(linear: nn.Module) -> tuple[int, int]:
    """(D_in, D_out) of a linear layer, quantised or not, with an update of mlx-lm's LoRA or without."""
    linear = bare(linear)
    output_size, input_size = linear["weight"].shape
    if isinstance(linear, nn.QuantizedLinear):
        input_size = input_size * 32 // linear.bits
    return int(input_size), int(output_size)
