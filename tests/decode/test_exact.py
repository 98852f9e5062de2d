"""Proves that exact decoding computes the very logits of plain decoding, bit for bit, dense and quantised."""

from __future__ import annotations

import gc
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx_lm.models import base as mlx_lm_base
from mlx_lm.models import llama

from mtp_mlx.decode.loop import mtp_generate_step
from mtp_mlx.decode.policy import FixedPolicy
from mtp_mlx.decode.stats import DecodeStats
from mtp_mlx.errors import MTPError
from mtp_mlx.model.attach import AttachedModel, attach
from tests.decode.fakes import MOST_SLOTS, KnowingDrafter, drafting, random_adapter
from tests.tiny import tiny_model

PROMPT = [3, 5, 7, 3, 5, 7, 3, 5]


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
@pytest.mark.parametrize("architecture", ["llama", "qwen3", "gemma2"])
def test_logits_are_those_of_plain_decoding(architecture: str, bits: int, layout: str) -> None:
    attached = adapted(model(architecture, bits), exact=True)
    tokens, expected = plain_logits(attached, 40)
    found_tokens, found = drafted_logits(attached, layout, tokens)
    assert found_tokens == tokens
    assert same_bits(expected, found)


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("seam", ["linear", "attention", "head"])
def test_every_product_of_a_real_row_is_a_call_of_its_own(
    seam: str, exact: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The law above is not empty: with layers whose result depends on the rows of the call, only exact holds."""

    def falsified(call: Any, row_axis: int) -> Any:
        def wrapper(*args: Any, **kwargs: Any) -> mx.array:
            out = call(*args, **kwargs)
            return out * (1 + 0.05 * (out.shape[row_axis] - 1)) if out.shape[row_axis] < 30 else out

        return wrapper

    if seam == "linear":
        monkeypatch.setattr(nn.QuantizedLinear, "__call__", falsified(nn.QuantizedLinear.__call__, 1))
    elif seam == "attention":
        patched = falsified(mlx_lm_base.scaled_dot_product_attention, 2)
        monkeypatch.setattr(mlx_lm_base, "scaled_dot_product_attention", patched)
        monkeypatch.setattr(llama, "scaled_dot_product_attention", patched)
    else:
        patched = falsified(nn.QuantizedEmbedding.as_linear, 1)
        monkeypatch.setattr(nn.QuantizedEmbedding, "as_linear", patched)
    base = tiny_model(
        "llama", seed=3, hidden_size=64, intermediate_size=96, tie_word_embeddings=seam == "head"
    )
    nn.quantize(base, group_size=32, bits=4)
    attached = adapted(base, exact)
    tokens, expected = plain_logits(attached, 24)
    with drafting(KnowingDrafter(tokens, len(PROMPT), 1.0, seed=0)):
        policy = FixedPolicy("quadratic", MOST_SLOTS)
        found = [item.logits for item in mtp_generate_step(PROMPT, attached, max_tokens=24, policy=policy)]
    assert same_bits(expected, found) == exact


def test_a_quantised_cache_is_exact_too() -> None:
    base = tiny_model("qwen3", seed=3, hidden_size=64, intermediate_size=96, head_dim=32)
    attached = adapted(base, exact=True)
    options = {"kv_bits": 8, "kv_group_size": 32, "quantized_kv_start": 20}
    tokens, expected = plain_logits(attached, 40, **options)
    found_tokens, found = drafted_logits(attached, "linear", tokens, **options)
    assert found_tokens == tokens
    assert same_bits(expected, found)


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
