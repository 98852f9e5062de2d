"""Proves that exact decoding computes the very logits of plain decoding, bit for bit, dense and quantised; and past a
sliding window those of mlx-lm."""

from __future__ import annotations

import gc
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx_lm.generate import generate_step
from mlx_lm.models import base as mlx_lm_base
from mlx_lm.models import llama, qwen2, qwen3
from mlx_lm.models.cache import KVCache, RotatingKVCache, make_prompt_cache

from mtp_mlx.decode.loop import mtp_generate_step
from mtp_mlx.decode.policy import FixedPolicy
from mtp_mlx.decode.stats import DecodeStats
from mtp_mlx.errors import MTPError
from mtp_mlx.model.attach import AttachedModel, attach
from tests.decode.fakes import MOST_SLOTS, KnowingDrafter, drafting, random_adapter
from tests.decode.trees import AnyTree, KnowingTrees
from tests.tiny import tiny_model

PROMPT = [3, 5, 7, 3, 5, 7, 3, 5]
KV = {"kv_bits": 8, "kv_group_size": 32, "quantized_kv_start": 0}


def model(architecture: str, bits: int) -> Any:
    base = tiny_model(architecture, seed=3, hidden_size=64, intermediate_size=96)
    if bits:
        nn.quantize(base, group_size=32, bits=bits)
    return base


def adapted(base: Any, exact: bool) -> AttachedModel:
    return attach(base, random_adapter(base), exact=exact)


def plain_logits(attached: AttachedModel, n: int, **options: Any) -> tuple[list[int], list[mx.array]]:
    found = list(mtp_generate_step(PROMPT, attached, max_tokens=n, **options))
    return [item.token for item in found], [item.logits for item in found]


def drafted_logits(
    attached: AttachedModel, layout: Any, truth: list[int], **options: Any
) -> tuple[list[int], list[mx.array]]:
    """With a drafter that is right four times of five; proves that it saved passes."""
    stats = DecodeStats()
    policy = FixedPolicy(layout, MOST_SLOTS)
    with drafting(KnowingDrafter(truth, len(PROMPT), 0.8, seed=0)):
        found = list(
            mtp_generate_step(PROMPT, attached, max_tokens=len(truth), policy=policy, stats=stats, **options)
        )
    assert stats.steps < 0.8 * len(truth), "few drafts were accepted, so little was proven"
    return [item.token for item in found], [item.logits for item in found]


def same_bits(expected: list[mx.array], found: list[mx.array]) -> bool:
    return all(mx.array_equal(one, other).item() for one, other in zip(expected, found, strict=True))


@pytest.mark.parametrize("layout", ["linear", "quadratic"])
@pytest.mark.parametrize("bits", [0, 4, 8])
@pytest.mark.parametrize("architecture", ["llama", "qwen3", "phi3"])
def test_logits_are_those_of_plain_decoding(architecture: str, bits: int, layout: str) -> None:
    attached = adapted(model(architecture, bits), exact=True)
    tokens, expected = plain_logits(attached, 40)
    found_tokens, found = drafted_logits(attached, layout, tokens)
    assert found_tokens == tokens
    assert same_bits(expected, found)


WINDOWED = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 4}


def falsified(call: Any, row_axis: int) -> Any:
    """A function whose result depends on how many rows the call has; prompts of 30 and more are left alone."""

    def wrapper(*args: Any, **kwargs: Any) -> mx.array:
        out = call(*args, **kwargs)
        return out * (1 + 0.05 * (out.shape[row_axis] - 1)) if out.shape[row_axis] < 30 else out

    return wrapper


def falsify(seam: str, module: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes one kind of a model's computations depend on the rows of the call."""
    if seam == "linear":
        monkeypatch.setattr(nn.QuantizedLinear, "__call__", falsified(nn.QuantizedLinear.__call__, 1))
    elif seam == "rope":
        monkeypatch.setattr(nn.RoPE, "__call__", falsified(nn.RoPE.__call__, 2))
    elif seam == "attention":
        patched = falsified(mlx_lm_base.scaled_dot_product_attention, 2)
        monkeypatch.setattr(mlx_lm_base, "scaled_dot_product_attention", patched)
        monkeypatch.setattr(module, "scaled_dot_product_attention", patched)
    else:
        patched = falsified(nn.QuantizedEmbedding.as_linear, 1)
        monkeypatch.setattr(nn.QuantizedEmbedding, "as_linear", patched)


@pytest.mark.parametrize("layout", ["linear", "quadratic"])
@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize(
    ("module", "seam", "overrides", "options"),
    [
        (llama, "linear", {}, {}),
        (llama, "rope", {}, {}),
        (llama, "attention", {}, {}),
        (llama, "head", {"tie_word_embeddings": True}, {}),
        (llama, "attention", WINDOWED, {}),
        (qwen2, "linear", {}, {}),
        (qwen2, "attention", {"num_attention_heads": 2, "num_key_value_heads": 1}, KV),
        (qwen3, "attention", {"head_dim": 32}, KV),
    ],
)
def test_every_computation_of_a_real_row_is_a_call_of_its_own(
    module: Any,
    seam: str,
    overrides: dict[str, Any],
    options: dict[str, Any],
    exact: bool,
    layout: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The law above is not empty: with computations that depend on the rows of the call, only exact holds."""
    falsify(seam, module, monkeypatch)
    name = module.__name__.rsplit(".", 1)[-1]
    base = tiny_model(name, seed=3, hidden_size=64, intermediate_size=96, **overrides)
    nn.quantize(base, group_size=32, bits=4)
    attached = adapted(base, exact)

    def cache() -> dict[str, Any]:  # llama's own for windows gives no rows back; a plain one does
        return {"prompt_cache": [KVCache() for _ in base.layers]} if overrides is WINDOWED else {}

    tokens, expected = plain_logits(attached, 24, **options, **cache())
    with drafting(KnowingDrafter(tokens, len(PROMPT), 1.0, seed=0)):
        policy = FixedPolicy(layout, MOST_SLOTS)
        steps = mtp_generate_step(PROMPT, attached, max_tokens=24, policy=policy, **options, **cache())
        found = [item.logits for item in steps]
    assert same_bits(expected, found) == exact


def test_a_quantised_cache_is_exact_too() -> None:
    base = tiny_model("qwen3", seed=3, hidden_size=64, intermediate_size=96, head_dim=32)
    attached = adapted(base, exact=True)
    options = {"kv_bits": 8, "kv_group_size": 32, "quantized_kv_start": 20}
    tokens, expected = plain_logits(attached, 40, **options)
    found_tokens, found = drafted_logits(attached, "linear", tokens, **options)
    assert found_tokens == tokens
    assert same_bits(expected, found)


TREES: list[tuple[str, int, dict[str, Any]]] = [
    ("llama", 0, {}),
    ("qwen3", 4, {}),
    ("gemma3_text", 0, {}),
    ("olmo3", 0, {}),
    ("qwen3", 0, {"kv_bits": 8, "kv_group_size": 32, "quantized_kv_start": 12}),
]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("name", "bits", "options"), TREES)
def test_rows_of_a_tree_are_those_of_plain_decoding(
    name: str, bits: int, options: dict[str, Any], seed: int
) -> None:
    """A row sees its ancestors and no other branch, at the position of its depth."""
    base = tiny_model(name, seed=3, hidden_size=64, intermediate_size=96, head_dim=32)
    if bits:
        nn.quantize(base, group_size=32, bits=bits)
    attached, stats = adapted(base, exact=True), DecodeStats()
    tokens, expected = plain_logits(attached, 40, **options)
    policy: Any = AnyTree(MOST_SLOTS, seed)
    with drafting(KnowingTrees(tokens, len(PROMPT), 0.9, seed)):  # type: ignore[arg-type]
        steps = mtp_generate_step(PROMPT, attached, max_tokens=40, policy=policy, stats=stats, **options)
        found = list(steps)
    assert [item.token for item in found] == tokens and same_bits(expected, [item.logits for item in found])
    assert sum(layout.startswith("tree") for layout in stats.layouts) > 4 and sum(stats.accepted) > 8


def mlx_lm_turns(base: Any, cache: list[Any], prompts: list[list[int]], most: int) -> list[list[mx.array]]:
    """Tokens and raw logits of mlx-lm's own turns over one cache."""
    turns = []
    for prompt in prompts:
        seen: list[mx.array] = []
        keep = [lambda _, logits, seen=seen: seen.append(logits[0]) or logits]
        steps = generate_step(
            mx.array(prompt), base, max_tokens=most, prompt_cache=cache, logits_processors=keep
        )
        turns.append(([int(token) for token, _ in steps], seen[:most]))
    return turns


@pytest.mark.parametrize("layout", ["plain", "linear", "quadratic"])
@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
@pytest.mark.parametrize("name", ["gemma3_text", "olmo3", "ministral3", "llama"])
def test_past_a_sliding_window_logits_are_those_of_mlx_lm(name: str, dtype: mx.Dtype, layout: Any) -> None:
    """Whose ring has the rows in another order; also in turns of one token, which go on with the ring of the last."""
    theirs, ours = tiny_model(name, seed=3), tiny_model(name, seed=3)
    theirs.set_dtype(dtype), ours.set_dtype(dtype)
    attached = adapted(ours, exact=True)
    prompts, most = [[3, 5, 7, 3, 5, 7, 3, 5, 9, 11], [4], [8, 2, 6], [1]], 9

    def cache() -> list[Any]:  # llama with a cache that rotates
        return [RotatingKVCache(6) if name == "llama" else one for one in make_prompt_cache(theirs)]

    own, cached = cache(), 0
    for prompt, (tokens, logits) in zip(prompts, mlx_lm_turns(theirs, cache(), prompts, most)):
        cached += len(prompt)
        with drafting(KnowingDrafter(tokens, cached, 0.7, seed=1)):
            policy = FixedPolicy(layout, MOST_SLOTS)
            steps = mtp_generate_step(prompt, attached, max_tokens=most, policy=policy, prompt_cache=own)
            found = list(steps)
        cached += most
        assert [item.token for item in found] == tokens
        assert same_bits(logits, [item.logits for item in found])


def test_detach_restores_the_attention_function() -> None:
    gc.collect()  # models of other tests give their claims back
    first, second = adapted(model("llama", 0), exact=True), adapted(model("llama", 4), exact=True)
    assert llama.scaled_dot_product_attention is not mlx_lm_base.scaled_dot_product_attention
    first.detach()
    assert llama.scaled_dot_product_attention is not mlx_lm_base.scaled_dot_product_attention
    second.detach()
    assert llama.scaled_dot_product_attention is mlx_lm_base.scaled_dot_product_attention


def test_mixtures_of_experts_are_refused_by_name() -> None:
    with pytest.raises(MTPError, match="mixture-of-experts.*switch_mlp"):
        attach(tiny_model("qwen3_moe"), exact=True)


def test_attention_that_no_hook_reaches_is_refused_by_name() -> None:
    """gemma2 computes its scores itself, so its rows cannot be taken one at a time from outside."""
    with pytest.raises(
        MTPError, match=r"attention that this model computes by itself \(layers.0.self_attn\)"
    ):
        attach(tiny_model("gemma2"), exact=True)
