"""Gradient checkpointing of decoder layers: activations of a layer are recomputed in the backward pass.

Memory of the slot pass falls from all layers' activations to one layer's, for about a third more time. The
loss is the same number: the forward pass computes exactly what it did.

The layer's class is exchanged for one pass and put back, so nothing of the model stays patched. The
recomputation happens after the pass has ended, when wrappers no longer know its rows; it is given them again.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten

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

        flat = cast("list[tuple[str, mx.array]]", tree_flatten(layer.trainable_parameters()))
        names = [name for name, _ in flat]

        def pure(hidden: mx.array, *values: mx.array) -> mx.array:
            layer.update(tree_unflatten(list(zip(names, values, strict=True))))
            with _given(rows, of_pass):
                return compute(layer, hidden, *args, **kwargs)

        return recomputed(pure)(hidden, *(value for _, value in flat))

    return type(kind.__name__, (kind,), {"__call__": call})


def recomputed(pure: Callable[..., mx.array]) -> Callable[..., mx.array]:
    """`pure`, arrays -> one array, that keeps its inputs alone and computes again for the backward pass.

    Unlike with `mx.checkpoint`, that waits for the gradient of its output, and the gradient of its first
    input waits for the others: MLX evaluates in no particular order, and layers recomputed early, or whose
    weights' gradients come late, would all be in memory at once.
    """
    function = mx.custom_function(pure)

    @function.vjp
    def backward(primals: tuple, cotangent: mx.array, _: mx.array) -> tuple[mx.array, ...]:
        waiting = mx.depends(list(primals), [cotangent])
        first, *others = mx.vjp(pure, waiting, [cotangent])[1]
        return (*mx.depends([first], others), *others) if others else (first,)

    return cast("Callable[..., mx.array]", function)


@contextmanager
def _given(rows: RowContext, state: RowContext) -> Iterator[None]:
    """`rows` says what `state` says inside the block, and what it said before after it."""
    before = vars(rows).copy()
    vars(rows).update(vars(state))
    try:
        yield
    finally:
        vars(rows).update(before)
