"""Proves that a speculator reads what it asks for, whatever the pass, and that the model is as before afterwards."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from mtp_mlx.errors import MTPError
from mtp_mlx.model.attach import attach
from mtp_mlx.model.block import Block
from mtp_mlx.model.speculator import Speculator
from tests.tiny import DENSE_ARCHITECTURES, tiny_model

TOKENS = mx.array([[5, 9, 2, 77, 140, 3]])


class Reading(Speculator):
    """Reads some layers."""

    def __init__(self, layers: tuple[int, ...], first: str = "post-norm") -> None:
        super().__init__()
        self._layers, self._first = layers, first

    @property
    def tapped_layers(self) -> tuple[int, ...]:
        return self._layers

    @property
    def first_hidden(self) -> str:
        return self._first


def by_hand(trunk: Any) -> list[mx.array]:
    """What every layer of a llama returns."""
    x, found = trunk.embed_tokens(TOKENS), []
    mask = mx.tril(mx.ones((6, 6), dtype=mx.bool_))
    for layer in trunk.layers:
        x = layer(x, mask, None)
        found.append(x)
    return found


@pytest.mark.parametrize("quantized", [False, True])
def test_states_of_layers_precede_the_last_one(quantized: bool) -> None:
    model = tiny_model("llama", seed=3, num_hidden_layers=4, hidden_size=64, intermediate_size=96)
    if quantized:
        nn.quantize(model, group_size=32, bits=4)
    layers = by_hand(model.model)
    expected = mx.concatenate([layers[0], layers[2], model.model.norm(layers[3])], axis=-1)
    attached = attach(model, Reading((1, 3)))
    assert attached.head_input_size == 3 * 64
    hidden = attached.forward(Block.real(TOKENS), attached.make_cache())
    assert mx.array_equal(hidden, attached.head_input[..., -64:])
    for found in (attached.head_input, attached.states_of(TOKENS)):
        np.testing.assert_allclose(np.array(found), np.array(expected), rtol=1e-4, atol=1e-4)
    attached.detach()
    before = attach(model, Reading((2,), "pre-norm"))
    found = before.states_of(TOKENS)
    expected = mx.concatenate([layers[1], layers[3]], axis=-1)
    np.testing.assert_allclose(np.array(found), np.array(expected), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("architecture", [*DENSE_ARCHITECTURES, "gemma3_text", "qwen3_next"])
def test_the_model_is_put_back(architecture: str) -> None:
    """While attached its own call gives the same; detached or unwrapped its layers have their own classes again."""
    model = tiny_model(architecture, seed=3)
    kinds = [type(layer) for layer in model.model.layers]
    before = model(TOKENS)
    attached = attach(model, Reading((1, 2)))
    assert mx.array_equal(model(TOKENS), before).item()
    with attached.unwrapped() as bare:
        assert [type(layer) for layer in bare.model.layers] == kinds
    assert attached.states_of(TOKENS).shape[-1] == attached.head_input_size == 3 * attached.hidden_size
    with pytest.raises(MTPError, match="already attached"):
        attach(model, Reading((1,)))
    attached.detach()
    assert [type(layer) for layer in model.model.layers] == kinds
    assert not any("_tap" in vars(layer) for layer in model.model.layers)
    assert mx.array_equal(model(TOKENS), before).item()


def test_layers_that_are_not_there_or_return_more_are_refused() -> None:
    model = tiny_model("llama", seed=3)
    with pytest.raises(MTPError, match="read what layers 1, 9 return, and this model has 2"):
        attach(model, Reading((1, 9)))
    kind = type(model.model.layers[0])
    layer = model.model.layers[0]
    layer.__class__ = type(
        "Pair", (kind,), {"__call__": lambda *args, **other: (kind.__call__(*args, **other), 0)}
    )
    attach(model, Reading((1,)))
    with pytest.raises(MTPError, match="do not return hidden states alone"):
        model(TOKENS)
