"""Linear layers in a block: several rows in one read of quantised weights, or exact rows as if each were alone.

Contract: outside a pass, for a single row, or without kernels and `exact`, it just calls the wrapped layer.
- The kernel `small_m_qmm` runs where it is faster: rows differ from one-row calls by rounding only, as MLX's own do.
- Exact rows equal one-row calls bit for bit: by the kernel `row_exact`, or by one call per row.
"""

from __future__ import annotations

from collections.abc import Callable

import mlx.core as mx
import mlx.nn as nn

from mtp_mlx.metal_kernels.dispatch import Dispatcher
from mtp_mlx.model.rows import RowContext

MOST_ROWS = 16  # limit of the kernels; MLX's own matrix kernels take over from there
Apply = Callable[[mx.array], mx.array]


def _by_kernel(name: str, layer: nn.Module, x: mx.array, kernels: Dispatcher | None) -> mx.array | None:
    """The layer's output [1, R, D_out] of x [1, R, D_in] by a kernel for quantised weights, or None."""
    if kernels is None or x.ndim != 3 or x.shape[0] != 1 or not 2 <= x.shape[1] <= MOST_ROWS:
        return None
    if getattr(layer, "mode", "affine") != "affine" or layer.get("biases") is None:
        return None
    y = kernels.attempt(name, x[0], layer.weight, layer.scales, layer.biases, layer.group_size, layer.bits)
    if y is None:
        return None
    return y[None] + layer.bias if layer.get("bias") is not None else y[None]


def block_product(
    layer: nn.Module, apply: Apply, x: mx.array, n_exact: int, kernels: Dispatcher | None
) -> mx.array:
    """apply(x) for a block's rows, [B, R, D_in] -> [B, R, D_out].

    Args:
        layer: the layer that holds the weights.
        apply: the layer's own call.
        x: [B, R, D_in].
        n_exact: leading rows that must equal one-row calls.
        kernels: the dispatcher, or None.
    """
    n_rows = x.shape[-2]
    if n_exact and n_rows > 1:
        alone = _rows_alone(layer, apply, x[:, :n_exact], kernels)
        if n_exact >= n_rows:
            return alone
        return mx.concatenate([alone, block_product(layer, apply, x[:, n_exact:], 0, kernels)], axis=1)
    y = _by_kernel("small_m_qmm", layer, x, kernels)
    return apply(x) if y is None else y


def _rows_alone(layer: nn.Module, apply: Apply, x: mx.array, kernels: Dispatcher | None) -> mx.array:
    """The rows of x [B, R, D_in], each as in a call of its own."""
    y = _by_kernel("row_exact", layer, x, kernels)
    if y is not None:
        return y
    return mx.concatenate([apply(x[:, row : row + 1]) for row in range(x.shape[1])], axis=1)


class BlockLinear(nn.Module):
    """A linear layer that knows the rows of the pass in progress."""

    def __init__(self, base: nn.Module, rows: RowContext) -> None:
        super().__init__()
        self.base = base
        self._rows = rows

    def __call__(self, x: mx.array) -> mx.array:
        """[B, R, D_in] -> [B, R, D_out]."""
        if self._rows.n_real is None:
            return self.base(x)
        return block_product(self.base, self.base, x, self._rows.n_exact, self._rows.step_kernels)

    @property
    def weight(self) -> mx.array:
        """The base weight: some mlx-lm models read a projection's weight directly."""
        return self.base.weight


class BlockHead(nn.Module):
    """An LM head (a linear layer or a tied embedding) whose rows are exact or may run in a kernel."""

    def __init__(self, base: nn.Module, kernels: Dispatcher | None, exact: bool) -> None:
        super().__init__()
        self.base = base
        self._kernels, self._exact = kernels, exact

    def __call__(self, hidden: mx.array) -> mx.array:
        """[B, R, D] -> [B, R, V]."""
        apply = self.base.as_linear if hasattr(self.base, "as_linear") else self.base
        n_exact = hidden.shape[-2] if self._exact else 0
        return block_product(self.base, apply, hidden, n_exact, self._kernels)

    as_linear = __call__


def is_quantised(layer: nn.Module) -> bool:
    """Whether a linear layer or an embedding is quantised."""
    return isinstance(layer, nn.QuantizedLinear | nn.QuantizedEmbedding)
