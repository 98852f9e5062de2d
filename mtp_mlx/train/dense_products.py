"""Quantised layers on a CPU, in training: many rows at once are multiplied by dequantised weights.

MLX's product with quantised weights on a CPU takes each row by itself, many times longer than BLAS does for a slice
of rows. On a GPU it is fast, and nothing is changed.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mtp_mlx.model.attach import AttachedModel
from mtp_mlx.train.grad_checkpoint import recomputed
from mtp_mlx.train.plan import on_cpu

FEWEST_ROWS = 8  # fewer are not worth dequantising a layer


class DenseLinear(nn.QuantizedLinear):
    """A quantised linear layer that dequantises its weights for many rows."""

    def __call__(self, x: mx.array) -> mx.array:
        """[..., D_in] -> [..., D_out]."""
        if _rows(x) < FEWEST_ROWS:
            return super().__call__(x)
        y = _product(self, x)
        return y + self.bias if "bias" in self else y


class DenseEmbedding(nn.QuantizedEmbedding):
    """A quantised embedding that dequantises its weights for many rows as an output layer."""

    def as_linear(self, x: mx.array) -> mx.array:
        """[..., D] -> [..., V]."""
        return super().as_linear(x) if _rows(x) < FEWEST_ROWS else _product(self, x)


DENSE: dict[type, type] = {nn.QuantizedLinear: DenseLinear, nn.QuantizedEmbedding: DenseEmbedding}


def _rows(x: mx.array) -> int:
    return x.size // x.shape[-1]


def _product(layer: Any, x: mx.array) -> mx.array:
    """x times the layer's weights, which are dequantised again in the backward pass instead of being kept."""

    def pure(x: mx.array) -> mx.array:
        weight = mx.dequantize(
            layer.weight, layer.scales, layer.get("biases"), layer.group_size, layer.bits, mode=layer.mode
        )
        return x @ weight.astype(x.dtype).T

    return recomputed(pure)(x)


@contextmanager
def dense_products(attached: AttachedModel) -> Iterator[None]:
    """In this context, on a CPU, the quantised layers of a model and of its heads multiply densely."""
    layers = []
    if on_cpu():
        modules = [*attached.model.modules(), attached.head.layer, attached.draft_head.layer]
        layers = [(module, type(module)) for module in modules if type(module) in DENSE]
    try:
        for module, kind in layers:
            module.__class__ = DENSE[kind]
        yield
    finally:
        for module, kind in layers:
            module.__class__ = kind
