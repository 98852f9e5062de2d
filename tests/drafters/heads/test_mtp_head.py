"""Proves the cascade of MTP heads: which token and state each row sees, its caches, and what conventions change."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm.models.base import create_attention_mask

from mtp_mlx.drafters.heads.cascade import MTPHeads, new_heads
from mtp_mlx.drafters.heads.convention import HeadConvention
from mtp_mlx.drafters.heads.mtp_head import block_like
from mtp_mlx.errors import MTPError
from mtp_mlx.model.attach import attach
from tests.decode.fakes import random_adapter
from tests.tiny import DENSE_ARCHITECTURES, VOCABULARY, tiny_model

TOKENS = mx.array([[5, 9, 2, 77, 140, 3, 9, 21]])


def random_heads(
    model: Any, count: int = 3, convention: HeadConvention | None = None, seed: int = 0, **shape: Any
) -> MTPHeads:
    """Heads none of whose weights is symmetric, so that a swapped half or a wrong row shows."""
    heads = new_heads(model, count, convention or HeadConvention("test"), **shape)
    rng = np.random.default_rng(seed)
    noise = [
        (name, value + mx.array(0.2 * rng.normal(size=value.shape).astype(np.float32)))
        for name, value in tree_flatten(heads.parameters())
    ]
    heads.load_weights(noise)
    return heads


def inputs(model: Any) -> tuple[mx.array, mx.array]:
    """Embeddings and trunk states of TOKENS."""
    return model.model.embed_tokens(TOKENS), model.model(TOKENS)


@pytest.mark.parametrize("architecture", DENSE_ARCHITECTURES)
def test_a_row_depends_on_no_later_token(architecture: str) -> None:
    """z of head k at position i is a function of tokens up to i + k and of trunk states up to i."""
    model = tiny_model(architecture, seed=3)
    heads = random_heads(model)
    embeddings, hidden = inputs(model)
    before = heads.cascade(embeddings, hidden)
    assert [z.shape[1] for z in before] == [7, 6, 5]
    at = 4
    changed = mx.concatenate([embeddings[:, :at], embeddings[:, at:] + 1.0], axis=1)
    for depth, (one, other) in enumerate(zip(before, heads.cascade(changed, hidden), strict=True), start=1):
        same = mx.all(mx.abs(one - other) < 1e-5, axis=-1)[0].tolist()
        assert same == [i + depth < at for i in range(one.shape[1])], depth
    moved = mx.concatenate([hidden[:, :at], hidden[:, at:] + 1.0], axis=1)
    for one, other in zip(before, heads.cascade(embeddings, moved), strict=True):
        same = mx.all(mx.abs(one - other) < 1e-5, axis=-1)[0].tolist()
        assert same == [i < at for i in range(one.shape[1])]


@pytest.mark.parametrize("architecture", ["llama", "gemma2", "phi3"])
def test_row_by_row_with_caches_equals_the_cascade(architecture: str) -> None:
    model = tiny_model(architecture, seed=3)
    heads = random_heads(model)
    embeddings, hidden = inputs(model)
    expected = heads.cascade(embeddings, hidden)
    caches = [head.make_cache() for head in heads.heads]
    for position in range(5):
        state = hidden[:, position : position + 1]
        for depth, (head, cache) in enumerate(zip(heads.heads, caches, strict=True), start=1):
            token = embeddings[:, position + depth : position + depth + 1]
            z, state = head(token, state, create_attention_mask(state, cache), cache)
            np.testing.assert_allclose(
                np.array(z[0, 0]), np.array(expected[depth - 1][0, position]), rtol=1e-4, atol=1e-4
            )


def test_the_first_half_of_fuse_acts_on_the_embedding() -> None:
    model = tiny_model("llama", seed=3)
    heads = random_heads(model, 1)
    embeddings, hidden = inputs(model)
    size = hidden.shape[-1]
    weight = heads.heads[0].fuse.weight
    heads.heads[0].fuse.weight = mx.concatenate([weight[:, :size], mx.zeros((size, size))], axis=1)
    same = mx.allclose(heads.cascade(embeddings, hidden)[0], heads.cascade(embeddings, hidden * -3 + 1)[0])
    assert same.item()
    assert not mx.allclose(
        heads.cascade(embeddings, hidden)[0], heads.cascade(embeddings * -3 + 1, hidden)[0]
    ).item()


def test_conventions() -> None:
    model = tiny_model("llama", seed=3)
    embeddings, hidden = inputs(model)

    def outputs(**convention: Any) -> list[mx.array]:
        return random_heads(model, 2, HeadConvention("test", **convention)).cascade(embeddings, hidden)

    default, raw = outputs(), outputs(recycled_hidden="raw")
    assert mx.array_equal(default[0], raw[0]).item() and not mx.allclose(default[1], raw[1]).item()
    masked = outputs(mask_first_position=True)
    assert not mx.allclose(default[0][:, 0], masked[0][:, 0]).item()
    bare = random_heads(model, 1, HeadConvention("test", output_norm="identity"))
    assert "norm_out" not in bare.heads[0]


def test_few_tokens_leave_the_far_heads_out() -> None:
    model = tiny_model("llama", seed=3)
    heads = random_heads(model, 3)
    embeddings, hidden = inputs(model)
    assert [z.shape[1] for z in heads.cascade(embeddings[:, :3], hidden[:, :3])] == [2, 1]
    assert heads.cascade(embeddings[:, :1], hidden[:, :1]) == []


def test_blocks_of_quantised_models_are_dense_and_apart_from_the_trunk() -> None:
    model = tiny_model("qwen3", seed=3, hidden_size=64, intermediate_size=96)
    nn.quantize(model, group_size=32, bits=8)
    block = block_like(model.model)
    assert not any(isinstance(module, nn.QuantizedLinear) for _, module in block.named_modules())
    x = mx.random.normal((1, 4, 64), key=mx.random.key(0))
    expected = model.model.layers[-1](x, "causal", None)
    np.testing.assert_allclose(np.array(block(x, "causal", None)), np.array(expected), rtol=1e-3, atol=1e-3)
    before = model.model.layers[-1].input_layernorm.weight
    block.input_layernorm.weight = before * 2
    assert mx.array_equal(model.model.layers[-1].input_layernorm.weight, before).item()
    assert VOCABULARY == model.model.embed_tokens.weight.shape[0]


def test_an_attached_model_is_refused() -> None:
    model = tiny_model("llama", seed=3)
    attach(model, random_adapter(model))
    with pytest.raises(MTPError, match="detach it first"):
        new_heads(model, 1, HeadConvention("test"))
    with pytest.raises(MTPError, match="at least one head"):
        new_heads(tiny_model("llama"), 0, HeadConvention("test"))
