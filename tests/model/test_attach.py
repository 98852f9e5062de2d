"""Proves that attaching changes no bit of real rows, detaching restores the model, and slot rows equal those
of a causal sequence per slot, computed by a second implementation, for every architecture and layout."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mlx.utils import tree_flatten
from mlx_lm.models.cache import ArraysCache, CacheList, ChunkedKVCache, KVCache, RotatingKVCache
from mlx_lm.models.internlm3 import DynamicNTKScalingRoPE

from mtp_mlx.drafters.masks.weights import MaskAdapterConfig, new_adapter
from mtp_mlx.errors import MTPError
from mtp_mlx.model.attach import AttachedModel, attach
from mtp_mlx.model.block import Block, block_shape
from mtp_mlx.model.seams import check_caches, find_seams
from tests.model.naive import NaiveModel, quantized_model, random_adapter
from tests.tiny import ARCHITECTURES, MOE_ARCHITECTURES, VOCABULARY, tiny_model

QUANTIZED = ["llama-4bit", "qwen3-8bit", "gemma2-4bit"]
MODELS = [*ARCHITECTURES, *QUANTIZED]
QUADRATIC, LINEAR, UNEVEN = (2, 2, 2), (0, 0, 3), (3, 0, 1, 2)
PREFIX = [11, 42, 7, 99, 3, 150]
# Sums over differently shaped matrices are rounded differently.
TOLERANCE = {"rtol": 2e-4, "atol": 2e-4}


def build(name: str) -> Any:
    """A fresh model of the same weights every time."""
    architecture, _, bits = name.partition("-")
    if bits:
        return quantized_model(architecture, int(bits[0]))
    return tiny_model(architecture, seed=3)


@lru_cache(maxsize=64)
def bare(name: str) -> AttachedModel:
    """The model with nothing on it."""
    return attach(build(name))


@lru_cache(maxsize=64)
def dressed(name: str, seed: int = 0) -> AttachedModel:
    """The model with a random adapter on it."""
    model = build(name)
    return attach(model, random_adapter(model, seed))


@lru_cache(maxsize=64)
def naive(name: str) -> NaiveModel:
    """The second implementation with the weights of `dressed(name)`."""
    return NaiveModel(build(name), dressed(name).speculator)


def draw_tokens(count: int, seed: int) -> list[int]:
    return np.random.default_rng(seed).integers(3, VOCABULARY, count).tolist()


def run(attached: AttachedModel, prefix: list[int], drafts: list[int], slots: tuple[int, ...]) -> mx.array:
    """[1, R, D] of a decoding step: `drafts[0]` is the pending token."""
    cache = attached.make_cache()
    if prefix:
        mx.eval(attached.forward(Block.real(mx.array([prefix])), cache))
    shape = block_shape(len(drafts) - 1, slots)
    return attached.forward(Block.decode(mx.array(drafts), shape, len(prefix), attached.vocab_size), cache)


# --- identity -----------------------------------------------------------------------------------------------

layouts = st.integers(0, 3).flatmap(lambda drafts: st.tuples(*[st.integers(0, 4)] * (drafts + 1)).filter(any))


@pytest.mark.parametrize("name", MODELS)
@settings(max_examples=8, deadline=None)
@given(slots=layouts, length=st.integers(0, 9), seed=st.integers(0, 99))
def test_real_rows_are_the_base_models_bit_for_bit(
    name: str, slots: tuple[int, ...], length: int, seed: int
) -> None:
    """Same rows in the block: no adapter's weights reach a real row."""
    prefix, drafts = draw_tokens(length, seed), draw_tokens(len(slots), seed + 1)
    one, other = dressed(name), dressed(name, seed=1)
    first, second = run(one, prefix, drafts, slots), run(other, prefix, drafts, slots)
    real = slice(0, len(drafts))
    assert mx.array_equal(one.head(first)[:, real], other.head(second)[:, real])
    assert not np.allclose(np.array(first)[:, len(drafts) :], np.array(second)[:, len(drafts) :], atol=1e-3)
    plain = bare(name).model(mx.array([[*prefix, *drafts]]))[:, len(prefix) :]
    np.testing.assert_allclose(np.array(one.head(first)[:, real]), np.array(plain), **TOLERANCE)


@pytest.mark.parametrize("name", MODELS)
def test_blocks_without_slots_are_the_base_models_bit_for_bit(name: str) -> None:
    tokens = mx.array([PREFIX, PREFIX[::-1]])
    one, plain = dressed(name), bare(name)
    hidden = one.forward(Block.real(tokens), one.make_cache())
    assert mx.array_equal(one.head(hidden), plain.model(tokens, cache=plain.make_cache()))
    assert mx.array_equal(one.model(tokens), plain.model(tokens))  # outside a pass the wrappers are not there


@pytest.mark.parametrize("name", ["llama", "qwen3", "llama-4bit"])
def test_slots_beside_them_change_no_bit_of_real_rows(name: str) -> None:
    """Eight rows either way, so that sums run alike: five drafts and two slots, or seven drafts."""
    drafts = draw_tokens(8, 0)
    attached = dressed(name)
    with_slots = run(attached, PREFIX, drafts[:6], (0, 0, 0, 0, 0, 2))
    without = run(attached, PREFIX, drafts, (0,) * 8)
    assert mx.array_equal(with_slots[:, :6], without[:, :6])
    assert not mx.allclose(with_slots[:, 6:], without[:, 6:])


@pytest.mark.parametrize("name", MODELS)
def test_detach_restores_the_very_objects(name: str) -> None:
    model = build(name)
    modules = {path: id(module) for path, module in model.named_modules()}
    weights = {path: id(value) for path, value in tree_flatten(model.parameters())}
    attached = attach(model, random_adapter(model))
    assert {id(module) for _, module in model.named_modules()} - set(modules.values())
    run(attached, PREFIX, [5, 6], (1, 2))
    attached.detach()
    assert {path: id(module) for path, module in model.named_modules()} == modules
    assert {path: id(value) for path, value in tree_flatten(model.parameters())} == weights
    attach(model, random_adapter(model))  # and it can be attached to again


# --- slot rows ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("slots", [QUADRATIC, LINEAR, UNEVEN, (4,)], ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_slot_rows_are_those_of_a_causal_sequence(name: str, slots: tuple[int, ...]) -> None:
    """Slot j of group a: prefix, drafts up to a, slots 1..j, nothing else, in one causal pass."""
    drafts = draw_tokens(len(slots), 5)
    hidden = np.array(run(dressed(name), PREFIX, drafts, slots)[0])
    expected = naive(name).hidden([*PREFIX, *drafts], 0)[len(PREFIX) :]
    np.testing.assert_allclose(hidden[: len(drafts)], expected, **TOLERANCE)
    starts = block_shape(len(drafts) - 1, slots).group_start
    for accepted, count in enumerate(slots):
        if count:
            alone = naive(name).hidden([*PREFIX, *drafts[: accepted + 1]], count)[-count:]
            own = hidden[starts[accepted] : starts[accepted] + count]
            np.testing.assert_allclose(own, alone, **TOLERANCE)
            if count > 1:
                assert not np.allclose(own[0], own[1], atol=1e-2)


@settings(max_examples=25, deadline=None)
@given(slots=layouts, length=st.integers(0, 9), seed=st.integers(0, 99))
def test_slot_rows_of_any_layout(slots: tuple[int, ...], length: int, seed: int) -> None:
    prefix, drafts = draw_tokens(length, seed), draw_tokens(len(slots), seed + 1)
    hidden = np.array(run(dressed("qwen3"), prefix, drafts, slots)[0])
    starts = block_shape(len(drafts) - 1, slots).group_start
    for accepted, count in enumerate(slots):
        if count:
            alone = naive("qwen3").hidden([*prefix, *drafts[: accepted + 1]], count)[-count:]
            np.testing.assert_allclose(
                hidden[starts[accepted] : starts[accepted] + count], alone, **TOLERANCE
            )


def test_rows_see_only_their_own_with_a_quantised_cache() -> None:
    """KV in 8 bits: near the exact rows, and blind to drafts behind them to the last bit."""
    model = tiny_model("llama", seed=3, head_dim=32)
    attached = attach(model, random_adapter(model))
    second = NaiveModel(tiny_model("llama", seed=3, head_dim=32), attached.speculator)
    shape = block_shape(2, QUADRATIC)

    def rows(drafts: list[int]) -> np.ndarray:
        cache = attached.make_cache()
        mx.eval(attached.forward(Block.real(mx.array([PREFIX])), cache))
        cache = [layer.to_quantized(group_size=32, bits=8) for layer in cache]
        block = Block.decode(mx.array(drafts), shape, len(PREFIX), attached.vocab_size)
        return np.array(attached.forward(block, cache)[0])

    hidden, changed = rows([5, 60, 70]), rows([5, 61, 70])
    for accepted, start in enumerate(shape.group_start):
        alone = second.hidden([*PREFIX, *[5, 60, 70][: accepted + 1]], 2)[-2:]
        error = np.abs(hidden[start : start + 2] - alone).max() / np.abs(alone).max()
        assert error < 0.25, (accepted, error)
    first = slice(shape.group_start[0], shape.group_start[0] + 2)
    np.testing.assert_array_equal(hidden[first], changed[first])
    assert not np.allclose(hidden[shape.group_start[1] :], changed[shape.group_start[1] :], atol=1e-3)


@pytest.mark.parametrize("length", [3, 9])
def test_sliding_windows_hide_what_is_too_far(length: int) -> None:
    """A window of 4 against mlx-lm's own windowed mask over the causal sequence of each slot."""
    overrides = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 4}
    model = tiny_model("llama", seed=3, **overrides)
    attached = attach(model, random_adapter(model))
    second = NaiveModel(tiny_model("llama", seed=3, **overrides), attached.speculator)
    prefix, drafts = draw_tokens(length, 1), draw_tokens(3, 2)
    cache = [KVCache() for _ in model.layers]
    mx.eval(attached.forward(Block.real(mx.array([prefix])), cache))
    shape = block_shape(2, QUADRATIC)
    hidden = np.array(
        attached.forward(Block.decode(mx.array(drafts), shape, length, attached.vocab_size), cache)[0]
    )
    for accepted, start in enumerate(shape.group_start):
        alone = second.hidden([*prefix, *drafts[: accepted + 1]], 2)[-2:]
        np.testing.assert_allclose(hidden[start : start + 2], alone, **TOLERANCE)


# --- refusals -----------------------------------------------------------------------------------------------


def without(model: Any, path: str) -> Any:
    """The model without the module `path` of its trunk, or of every layer's attention."""
    if path == "rope":
        for layer in model.layers:
            layer.self_attn.pop("rope")
    else:
        model.model.pop(path)
    return model


@pytest.mark.parametrize(
    ("path", "message"),
    [("layers", "seam 'trunk'"), ("embed_tokens", "seam 'embed_tokens'"), ("rope", "seam 'rope'")],
)
def test_a_missing_seam_is_named(path: str, message: str) -> None:
    model = tiny_model("llama")
    adapter = random_adapter(model)
    with pytest.raises(MTPError, match=message):
        attach(without(model, path), adapter)


@pytest.mark.parametrize(
    ("name", "seam"),
    [
        ("gpt2", "trunk"),
        ("gpt_neox", "trunk"),
        ("plamo", "trunk"),
        ("gemma3n", "trunk"),
        ("longcat_flash_ngram", "embed_tokens"),
    ],
)
def test_families_that_cannot_be_used_say_so(name: str, seam: str) -> None:
    """They are named in docs/quickstart.md; tests/test_architectures.py has all."""
    sentence = f"models of type '{name}' cannot be used here: .*seam '{seam}'.*use mlx-lm"
    with pytest.raises(MTPError, match=sentence):
        attach(tiny_model(name))


def test_slots_are_not_looked_up_in_other_tables_of_tokens() -> None:
    """Gemma 4 has one more, which has no row for a slot; what lies behind its last row must not matter."""
    asked: list[int] = []

    class Table(nn.Embedding):
        def __call__(self, ids: mx.array) -> mx.array:
            asked.extend(ids.reshape(-1).tolist())  # type: ignore[arg-type]
            return super().__call__(ids)

    model = tiny_model("gemma4_text", seed=3)
    table = model.model.embed_tokens_per_layer
    table.__class__ = Table
    attached = attach(model, random_adapter(model))
    block = Block(ids=mx.array([[*PREFIX, VOCABULARY, VOCABULARY + 1]]), n_real=len(PREFIX))
    hidden = attached.forward(block, attached.make_cache())
    assert asked[: len(PREFIX)] == PREFIX and max(asked) < VOCABULARY
    plain = model.model(mx.array([PREFIX]), cache=None)
    np.testing.assert_allclose(np.array(hidden[:, : len(PREFIX)]), np.array(plain), **TOLERANCE)
    attached.detach()
    assert model.model.embed_tokens_per_layer is table


def test_positions_are_a_seam_of_slots_only() -> None:
    """Without slot rows a pass is an ordinary one, whatever tells the model where a row stands."""
    model = without(tiny_model("llama"), "rope")
    for layer in model.layers:
        layer.self_attn.rope = lambda x, offset=0: x
    attached = attach(model)
    tokens = mx.array([PREFIX])
    hidden = attached.forward(Block.real(tokens), attached.make_cache())
    assert mx.array_equal(attached.head(hidden), model(tokens, cache=attached.make_cache()))
    with pytest.raises(MTPError, match="seam 'rope'"):
        new_adapter(model, MaskAdapterConfig(slots=2, rank=2))


def test_positions_that_depend_on_the_call_are_refused() -> None:
    model = tiny_model("llama")
    model.layers[1].self_attn.rope = DynamicNTKScalingRoPE(16)
    with pytest.raises(MTPError, match="seam 'rope' is DynamicNTKScalingRoPE"):
        attach(model)


def test_caches_that_cannot_take_rows_back_are_refused() -> None:
    chunked = tiny_model("llama")
    chunked.make_cache = lambda: [KVCache(), ChunkedKVCache(8)]
    with pytest.raises(MTPError, match="no seam 'cache' in layer 1: its ChunkedKVCache"):
        attach(chunked).make_cache()
    with pytest.raises(MTPError, match="model type 'm' has no seam 'cache' in layer 0: its ChunkedKVCache"):
        check_caches([CacheList(KVCache(), ChunkedKVCache(8))], "m")
    check_caches([KVCache(), KVCache().to_quantized(), RotatingKVCache(8), ArraysCache(2)], "m")


@pytest.mark.parametrize("name", MOE_ARCHITECTURES)
def test_routers_are_left_alone(name: str) -> None:
    model = tiny_model(name, seed=3)
    paths = find_seams(model).linears
    assert any(path.endswith("q_proj") for path in paths)
    assert not [path for path in paths if path.endswith(("gate", "router", "shared_expert_gate"))]
    routers = {path: module for path, module in model.named_modules() if path.endswith("mlp.gate")}
    assert routers
    attach(model, random_adapter(model))
    assert all(dict(model.named_modules())[path] is module for path, module in routers.items())


def test_attaching_twice_is_refused() -> None:
    model = tiny_model("llama")
    attached = attach(model, random_adapter(model))
    for adapter in (None, attached.speculator):
        with pytest.raises(MTPError, match="already attached; detach it first"):
            attach(model, adapter)
    attached.detach()
    attach(model, attached.speculator)


def test_an_adapter_of_another_shape_is_refused() -> None:
    deep = random_adapter(tiny_model("llama", num_hidden_layers=3))
    with pytest.raises(MTPError, match=r"layers this model lacks: \['layers.2"):
        attach(tiny_model("llama"), deep)


def test_unknown_target_modules_are_named() -> None:
    config = MaskAdapterConfig(target_modules=("q_proj", "query"))
    with pytest.raises(MTPError, match=r"\['query'\] are not linear layer.*'q_proj'"):
        new_adapter(tiny_model("llama"), config)
    adapter = new_adapter(tiny_model("llama"), MaskAdapterConfig(target_modules=("q_proj", "o_proj")))
    assert {path.rsplit(".", 1)[1] for path in adapter.low_rank} == {"q_proj", "o_proj"}


def test_unsigned_ids_do_not_wrap_around_into_slots() -> None:
    model = tiny_model("llama", seed=3)
    ids = mx.array([[5, 9, 14]])
    expected = model(ids)
    attach(model, new_adapter(model, MaskAdapterConfig(slots=2, rank=2, sampler_width=16)))
    assert mx.array_equal(model(ids.astype(mx.uint32)), expected)
