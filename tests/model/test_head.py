"""Proves that the head alone gives the model's own logits, for all ids or some, whatever follows the head."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.models import cohere

from mtp_mlx.decode.lookup import LookupDrafter
from mtp_mlx.decode.loop import mtp_generate_step
from mtp_mlx.decode.policy import LookupPolicy
from mtp_mlx.model.attach import attach
from mtp_mlx.model.head import HeadView, select_rows
from tests.model.naive import quantized_model, random_adapter
from tests.tiny import ARCHITECTURES, VOCABULARY, tiny_model

TOKENS = mx.array([[5, 9, 31, 77, 140], [8, 8, 2, 156, 0]])
COHERE = {
    **{"model_type": "cohere", "hidden_size": 64, "num_hidden_layers": 2, "intermediate_size": 96},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": VOCABULARY},
}
IDS = mx.array([0, 3, 9, 64, 77, 100, 156], dtype=mx.int32)


def models() -> list[Any]:
    cases = [pytest.param(name, {}, 0, id=name) for name in ARCHITECTURES]
    for name in ("llama", "qwen3", "granite"):  # gemma2 is tied by its nature
        cases.append(pytest.param(name, {"tie_word_embeddings": True}, 0, id=f"{name}-tied"))
        cases.append(pytest.param(name, {"tie_word_embeddings": True}, 4, id=f"{name}-tied-4bit"))
    cases += [
        pytest.param(name, {}, bits, id=f"{name}-{bits}bit")
        for name in ("llama", "gemma2")
        for bits in (4, 8)
    ]
    return cases


def build(name: str, overrides: dict[str, Any], bits: int) -> Any:
    return quantized_model(name, bits, **overrides) if bits else tiny_model(name, seed=3, **overrides)


@pytest.mark.parametrize(("name", "overrides", "bits"), models())
def test_head_view_is_the_models_head(name: str, overrides: dict[str, Any], bits: int) -> None:
    model = build(name, overrides, bits)
    expected = model(TOKENS)
    hidden = model.model(TOKENS)
    head = HeadView(model, model.model.embed_tokens)
    assert mx.array_equal(head(hidden), expected)
    if name == "granite":
        assert not mx.allclose(model.args.logits_scaling * head(hidden), head(hidden))
    if name == "gemma2":
        assert mx.abs(expected).max().item() <= 30.0


@pytest.mark.parametrize(("name", "overrides", "bits"), models())
def test_some_columns_are_those_of_all(name: str, overrides: dict[str, Any], bits: int) -> None:
    model = build(name, overrides, bits)
    hidden = model.model(TOKENS)
    some = HeadView(model, model.model.embed_tokens, IDS)(hidden)
    assert some.shape == (2, 5, len(IDS))
    np.testing.assert_allclose(np.array(some), np.array(model(TOKENS)[..., IDS]), rtol=1e-5, atol=1e-5)
    assert mx.array_equal(model(TOKENS), build(name, overrides, bits)(TOKENS))  # the model is as it was


def test_a_head_that_scales_by_an_argument_of_its_trunk() -> None:
    """Cohere's, whose text with drafts is then the model's own."""
    mx.random.seed(3)
    model = cohere.Model(cohere.ModelArgs(**COHERE))
    hidden, expected = model.model(TOKENS), model(TOKENS)
    assert mx.array_equal(HeadView(model, model.model.embed_tokens)(hidden), expected)
    attached = attach(model)
    found = [list(mtp_generate_step([5, 9, 5, 9, 5], attached, max_tokens=24))]
    drafting = {"policy": LookupPolicy(3), "lookup": LookupDrafter(3, 1)}
    found.append(list(mtp_generate_step([5, 9, 5, 9, 5], attached, max_tokens=24, **drafting)))
    texts = [[item.token for item in items] for items in found]
    assert texts[0] == texts[1] and len(texts[0]) == 24 and any(item.from_draft for item in found[1])


def test_attached_heads() -> None:
    """The draft head has the adapter's ids; both work on any leading axes, with the adapter on."""
    model = tiny_model("gemma2", seed=3)
    expected = model(TOKENS)
    attached = attach(model, random_adapter(model, draft_ids=IDS))
    hidden = model.model(TOKENS)
    assert mx.array_equal(attached.head(hidden), expected)
    flat = attached.draft_head(hidden.reshape(10, -1))
    np.testing.assert_allclose(
        np.array(flat), np.array(expected[..., IDS].reshape(10, -1)), rtol=1e-5, atol=1e-5
    )
    bare = tiny_model("gemma2", seed=3)
    assert attach(bare, random_adapter(bare)).draft_head(hidden).shape[-1] == VOCABULARY


def test_a_bias_follows_its_rows() -> None:
    layer = tiny_model("glm4", seed=3).layers[0].self_attn.q_proj
    assert "bias" in layer
    x = mx.random.normal((2, 48))
    np.testing.assert_allclose(
        np.array(select_rows(layer, mx.array([5, 1]))(x)), np.array(layer(x)[:, mx.array([5, 1])]), rtol=1e-5
    )


@pytest.mark.parametrize("name", ["internlm2", "llama4_text"])
def test_heads_of_another_name(name: str) -> None:
    """Their layer is `output`; a draft vocabulary took the rows of the embedding instead."""
    attached = attach(tiny_model(name, seed=3))
    hidden = mx.random.normal((1, 3, attached.hidden_size), key=mx.random.key(1))
    every = attached.head(hidden)
    some = attached._head_over(IDS)
    assert some.columns == IDS.size
    np.testing.assert_allclose(np.array(some(hidden)), np.array(every[..., IDS]), rtol=1e-5, atol=1e-5)
    assert attached.head.layer is attached.model.output
