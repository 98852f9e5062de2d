"""Gradient checkpointing of decoder layers: the backward pass recomputes a layer's activations.

Activations of one layer instead of all are in memory, for about a third more time. The loss does not change by a
bit: the forward pass is the same.

Layers get another class while a pass is built, and their own back after it, so the model does not stay patched.
Recomputation happens later, when the wrappers have forgotten the rows of that pass; they are told again.
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
    """Forward passes built in this context keep the inputs of each decoder layer only."""
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
    """A subclass of a decoder layer's class whose backward pass recomputes it."""
    compute = kind.__call__

    def call(layer: nn.Module, hidden: mx.array, *args: Any, **kwargs: Any) -> mx.array:
        # The other arguments are masks and caches, which are constants.
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
    """`pure` (arrays -> one array) with a backward pass that recomputes it from its inputs.

    Unlike in `mx.checkpoint`, recomputation waits for the gradient of the output, and the gradient of the first
    input waits for those of the others. MLX evaluates in no particular order: without this, layers that are
    recomputed early, or whose weights' gradients come late, would be in memory all at once.
    """
    function = mx.custom_function(pure)

    @function.vjp
    def backward(primals: Any, cotangent: mx.array, _: mx.array) -> Any:
        alone = isinstance(primals, mx.array)  # MLX gives the only input of a function by itself
        waiting = mx.depends([primals] if alone else list(primals), [cotangent])
        first, *others = mx.vjp(pure, waiting, [cotangent])[1]
        if not others:
            return first if alone else (first,)
        return (*mx.depends([first], others), *others)

    return cast("Callable[..., mx.array]", function)


@contextmanager
def _given(rows: RowContext, state: RowContext) -> Iterator[None]:
    """`rows` has the values of `state` in this context, and its own again after it."""
    before = vars(rows).copy()
    vars(rows).update(vars(state))
    try:
        yield
    finally:
        vars(rows).update(before)
