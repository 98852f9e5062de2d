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

    def call(layer: nn.Module, hidden: mx.array, *args: Any, **kwargs: Any) -> Any:
        of_pass = dataclasses.replace(rows)
        # What other layers computed of the same rows has gradients; masks and caches are constants.
        named = dict(enumerate(args)) | kwargs
        computed = {name: value for name, value in named.items() if _is_of_rows(value, hidden)}

        flat = cast("list[tuple[str, mx.array]]", tree_flatten(layer.trainable_parameters()))
        names = [name for name, _ in flat]

        def pure(hidden: mx.array, *values: mx.array) -> Any:
            layer.update(tree_unflatten(list(zip(names, values[len(computed) :], strict=True))))
            now = named | dict(zip(computed, values, strict=False))
            with _given(rows, of_pass):
                return compute(
                    layer, hidden, *(now[n] for n in range(len(args))), **{name: now[name] for name in kwargs}
                )

        return recomputed(pure)(hidden, *computed.values(), *(value for _, value in flat))

    return type(kind.__name__, (kind,), {"__call__": call})


def _is_of_rows(value: Any, hidden: mx.array) -> bool:
    """Whether an argument of a layer is numbers for every row, as its hidden states [B, R, D] are."""
    is_float = isinstance(value, mx.array) and mx.issubdtype(value.dtype, mx.floating)
    return is_float and value.shape[:2] == hidden.shape[:2]


def recomputed(pure: Callable[..., Any]) -> Callable[..., Any]:
    """`pure` (arrays -> an array or a tuple of arrays) with a backward pass that recomputes it from its inputs.

    Unlike in `mx.checkpoint`, recomputation waits for the gradient of the output, and the gradient of the first
    input waits for those of the others. MLX evaluates in no particular order: without this, layers that are
    recomputed early, or whose weights' gradients come late, would be in memory all at once.
    """
    function = mx.custom_function(pure)

    @function.vjp
    def backward(primals: Any, cotangent: Any, _: Any) -> Any:
        alone = isinstance(primals, mx.array)  # MLX gives the only input of a function by itself
        given = [cotangent] if isinstance(cotangent, mx.array) else list(cotangent)
        waiting = mx.depends([primals] if alone else list(primals), given)
        first, *others = mx.vjp(pure, waiting, given)[1]
        if not others:
            return first if alone else (first,)
        return (*mx.depends([first], others), *others)

    return cast("Callable[..., Any]", function)


@contextmanager
def _given(rows: RowContext, state: RowContext) -> Iterator[None]:
    """`rows` has the values of `state` in this context, and its own again after it."""
    before = vars(rows).copy()
    vars(rows).update(vars(state))
    try:
        yield
    finally:
        vars(rows).update(before)
