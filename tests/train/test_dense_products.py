"""Proves that training on a quantised base on a CPU multiplies densely, with the same results, and leaves the model's
layers as they were."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from mtp_mlx.model.attach import attach
from mtp_mlx.train import dense_products as module
from mtp_mlx.train.dense_products import DENSE, FEWEST_ROWS, dense_products
from tests.model.naive import quantized_model, random_adapter
from tests.train.training import trainer_for


@pytest.mark.parametrize("architecture", ["llama", "qwen3", "gemma2"])
def test_hidden_states_and_logits_stay(architecture: str) -> None:
    model = quantized_model(architecture, 4)
    attached = attach(model, random_adapter(model, draft_ids=mx.arange(0, 150, 2, dtype=mx.int32)))
    tokens = mx.arange(3, 3 + 2 * FEWEST_ROWS)[None]
    before = model.model(tokens), attached.head(model.model(tokens)), attached.draft_head(model.model(tokens))
    kinds = [type(layer) for layer in model.modules()]
    with dense_products(attached):
        assert {type(layer) for layer in model.modules()} & set(DENSE.values())
        hidden = model.model(tokens)
        found = hidden, attached.head(hidden), attached.draft_head(hidden)
        for one, other in zip(before, found, strict=True):
            np.testing.assert_allclose(np.array(other), np.array(one), rtol=1e-4, atol=1e-4)
    assert [type(layer) for layer in model.modules()] == kinds


def test_gradients_stay() -> None:
    layer: Any = nn.QuantizedLinear.from_linear(nn.Linear(64, 96), 64, 4)
    x, direction = mx.random.normal((FEWEST_ROWS, 64)), mx.random.normal((FEWEST_ROWS, 96))
    expected = mx.grad(lambda x: mx.sum(direction * layer(x)))(x)
    layer.__class__ = DENSE[nn.QuantizedLinear]
    found = mx.grad(lambda x: mx.sum(direction * layer(x)))(x)
    np.testing.assert_allclose(np.array(found), np.array(expected), rtol=1e-4, atol=1e-4)


def test_a_run_multiplies_densely_and_no_longer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    product = module._product
    monkeypatch.setattr(module, "_product", lambda layer, x: seen.append(x.shape[-2]) or product(layer, x))
    model = quantized_model("llama", 4)
    trainer_for(tmp_path / "a", model=model, steps=1, warmup=0).run()
    assert seen and min(seen) > 0
    assert not {type(layer) for layer in model.modules()} & set(DENSE.values())
