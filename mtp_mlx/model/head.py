"""The LM head alone: logits of given hidden states, over the whole vocabulary or a draft vocabulary.

No head arithmetic is copied from mlx-lm. A head view is a shallow copy of the model whose trunk hands the
hidden states straight through, so scaling and soft-capping that a model applies after its head are
applied here too (granite, gemma2). The user's model is not touched.
"""

from __future__ import annotations

import copy
from typing import Any

import mlx.core as mx
import mlx.nn as nn


class _PassThroughTrunk:
    """Stands where the trunk stands: returns what it is given, and knows the (tied) embedding."""

    def __init__(self, embed_tokens: Any) -> None:
        self.embed_tokens = embed_tokens

    def __call__(self, hidden: mx.array, *_: Any, **__: Any) -> mx.array:
        return hidden


class _RowsOfEmbedding:
    """Some rows of a tied embedding, as a linear layer."""

    def __init__(self, linear: nn.Module) -> None:
        self._linear = linear

    def as_linear(self, hidden: mx.array) -> mx.array:
        return self._linear(hidden)


def select_rows(layer: nn.Module, ids: mx.array) -> nn.Module:
    """A linear layer made of the rows `ids` [N] of a linear or embedding layer (quantised or not).

    The rows are copied, once; the result maps [..., D] to [..., N].
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


class HeadView:
    """Logits of hidden states [..., R, D] -> [..., R, V] (or N columns with a draft vocabulary).

    Args:
        model: an mlx-lm model, `model.model` its trunk.
        embed_tokens: the trunk's untouched embedding layer.
        ids: [N] int32 draft vocabulary, or None for the whole one.
    """

    def __init__(self, model: nn.Module, embed_tokens: nn.Module, ids: mx.array | None = None) -> None:
        view = copy.copy(model)
        tied: Any = embed_tokens
        if "lm_head" in view:
            if ids is not None:
                view["lm_head"] = select_rows(model.lm_head, ids)
        elif ids is not None:
            tied = _RowsOfEmbedding(select_rows(embed_tokens, ids))
        view.pop("model")
        object.__setattr__(view, "model", _PassThroughTrunk(tied))
        self._view = view

    def __call__(self, hidden: mx.array) -> mx.array:
        return self._view(hidden)
