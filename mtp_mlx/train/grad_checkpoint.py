"""Gradient checkpointing of decoder layers: activations of a layer are recomputed in the backward pass.

Memory of the slot pass falls from all layers' activations to one layer's, for about a third more time. The
loss is the same number: the forward pass computes exactly what it did.

The layer's class is exchanged for one pass and put back, so nothing of the model stays patched. The
recomputation happens after the pass has ended, when wrappers no longer know its rows; it is given them again.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mtp_mlx.model.attach import AttachedModel
from mtp_mlx.model.rows import RowContext


@contextmanager
def checkpointed_layers(attached: AttachedModel) -> Iterator[None]:
    """Forward passes built inside the block keep only the inputs of each decoder layer."""
    layers = list(attached.model.layers)
    classes = [type(layer) for layer in layers]
    for layer, kind in zip(layers, classes, strict=True):
        layer.__class__ = _checkpointed(kind, attached._rows)
    try:
        yield
    finally:
        for layer, kind in zip(layers, classes, strict=True):
            layer.__class__ = kind


def _checkpointed(kind: type[nn.Module], rows: RowContext) -> type[nn.Module]:
    """A subclass of a decoder layer's class that recomputes itself in the backward pass."""
    compute = kind.__call__

    def call(layer: nn.Module, hidden: mx.array, *args: Any, **kwargs: Any) -> mx.array:
        # Other arguments are masks and caches: constants of the pass.
        of_pass = dataclasses.replace(rows)

        def recomputed(parameters: dict, hidden: mx.array) -> mx.array:
            layer.update(parameters)
            with _given(rows, of_pass):
                return compute(layer, hidden, *args, **kwargs)

        return mx.checkpoint(recomputed)(layer.trainable_parameters(), hidden)

    return type(kind.__name__, (kind,), {"__call__": call})


@contextmanager
def _given(rows: RowContext, state: RowContext) -> Iterator[None]:
    """`rows` says what `state` says inside the block, and what it said before after it."""
    before = vars(rows).copy()
    vars(rows).update(vars(state))
    try:
        yield
    finally:
        vars(rows).update(before)
