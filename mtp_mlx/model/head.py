"""The LM head by itself: logits of given hidden states, over the full vocabulary or a draft vocabulary.

No head arithmetic is copied from mlx-lm. A head view is a shallow copy of the model with a trunk that returns its
input, so the scaling or soft-capping that a model applies after its head is applied here too (granite, gemma2). The
user's model is not changed.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mtp_mlx.metal_kernels.dispatch import Dispatcher
from mtp_mlx.model.block_linear import BlockHead, is_quantised
from mtp_mlx.model.seams import EMBEDDING_NAMES, text_model, trunk_name

HEAD_NAMES = (
    "lm_head",
    "output",
    "embed_out",
)  # of the LM head in mlx-lm's models, if it is not the embedding


class _PassThroughTrunk:
    """Replaces the trunk: returns the hidden states it is given; holds its (tied) embedding and its arguments."""

    def __init__(self, embedding: Any, args: Any) -> None:
        for name in EMBEDDING_NAMES:
            setattr(self, name, embedding)
        self.args = args  # cohere scales its logits by a number in them

    def __call__(self, *given: Any, **named: Any) -> mx.array:
        hidden: mx.array = given[0] if given else named["inputs"]  # minimax names it
        return hidden


class _RowsOfEmbedding:
    """Selected rows of a tied embedding, used as the output layer."""

    def __init__(self, linear: nn.Module) -> None:
        self._linear = linear

    def as_linear(self, hidden: mx.array) -> mx.array:
        return self._linear(hidden)


def select_rows(layer: nn.Module, ids: mx.array) -> nn.Module:
    """A linear layer with the rows `ids` [N] of a linear or embedding layer (quantised or not).

    The rows are copied; the result maps [..., D] to [..., N].
    """
    rows: nn.Module
    if hasattr(layer, "scales"):
        size = layer.weight.shape[1] * 32 // layer.bits
        mode = getattr(layer, "mode", "affine")
        rows = nn.QuantizedLinear(
            size, len(ids), bias=False, group_size=layer.group_size, bits=layer.bits, mode=mode
        )
        for name in ("weight", "scales", "biases"):
            if layer.get(name) is not None:
                rows[name] = layer[name][ids]
    else:
        rows = nn.Linear(layer.weight.shape[1], len(ids), bias=False)
        rows.weight = layer.weight[ids]
    if layer.get("bias") is not None:
        rows.bias = layer.bias[ids]
    mx.eval(rows.parameters())
    rows.freeze()
    return rows


@dataclass(frozen=True)
class Vocabulary:
    """The tokens that a draft is picked from.

    Attributes:
        head: gives the logits of these tokens.
        ids: [N] int32, the token id of each column; None for the full vocabulary in order.
    """

    head: HeadView
    ids: mx.array | None


class HeadView:
    """Logits of hidden states [..., R, D] -> [..., R, V] (or N columns with a draft vocabulary).

    Args:
        model: an mlx-lm model.
        embed_tokens: the trunk's untouched embedding layer.
        ids: [N] int32 draft vocabulary, or None for the full one.
        kernels: kernels that may run in place of stock MLX, or None.
        exact: whether every row's logits must equal those of a call with that row alone, bit for bit.
    """

    def __init__(
        self,
        model: nn.Module,
        embed_tokens: nn.Module,
        ids: mx.array | None = None,
        kernels: Dispatcher | None = None,
        exact: bool = False,
    ) -> None:
        model = text_model(model)
        view = copy.copy(model)
        own = next((known for known in HEAD_NAMES if view.get(known) is not None), None)
        layer = embed_tokens if own is None else view[own]
        self._layer: nn.Module = layer if ids is None else select_rows(layer, ids)
        head = self._layer
        if exact or (kernels is not None and is_quantised(head)):
            head = BlockHead(head, kernels, exact)
        tied: Any = embed_tokens
        if own is not None:
            view[own] = head
        else:
            tied = head if hasattr(head, "as_linear") else _RowsOfEmbedding(head)
        name = trunk_name(model) or "model"
        trunk = view.pop(name)
        object.__setattr__(view, name, _PassThroughTrunk(tied, getattr(trunk, "args", None)))
        self._view = view

    def __call__(self, hidden: mx.array) -> mx.array:
        return self._view(hidden)

    @property
    def layer(self) -> nn.Module:
        """The linear or embedding layer, or the draft vocabulary's rows of it."""
        return self._layer

    @property
    def columns(self) -> int:
        """V, or N with a draft vocabulary."""
        return int(self._layer.weight.shape[0])

    @property
    def matrix_arguments(self) -> tuple[Any, ...]:
        """(weight, scales, biases, group size, bits) of the layer, for the kernel `lm_head_pick`."""
        layer = self._layer
        if not is_quantised(layer):
            return layer.weight, None, None, 0, 0
        return layer.weight, layer.scales, layer.get("biases"), layer.group_size, layer.bits

    @cached_property
    def matrix(self) -> nn.Module | None:
        """The layer whose matrix product alone gives the logits; None if the model scales, caps or adds to them.

        This is tested: the head's output for a probe must equal the layer's product with it, bit for bit.
        """
        layer = self._layer
        if layer.get("bias") is not None:
            return None
        size = layer.weight.shape[1] * 32 // layer.bits if hasattr(layer, "scales") else layer.weight.shape[1]
        dtype = layer.scales.dtype if hasattr(layer, "scales") else layer.weight.dtype
        probe = mx.sin(mx.arange(size) * 0.7).astype(dtype)[None, None] * 8.0  # [1, 1, D]
        product = layer.as_linear(probe) if hasattr(layer, "as_linear") else layer(probe)
        return layer if mx.array_equal(self._view(probe), product).item() else None
