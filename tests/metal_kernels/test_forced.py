"""Proves the integration: a generation whose products, attention and picks all run as kernels writes the same tokens.

MTP_MLX_KERNELS=force on a machine without Metal runs the kernels' own text through the emulator.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mslemu
import pytest

from mtp_mlx.decode.loop import mtp_generate_step
from mtp_mlx.decode.pick import SamplingConfig
from mtp_mlx.decode.policy import FixedPolicy
from mtp_mlx.decode.stats import DecodeStats
from mtp_mlx.metal_kernels.dispatch import Dispatcher, default_dispatcher
from mtp_mlx.model.attach import AttachedModel, attach
from mtp_mlx.planning.grow import TreePolicy
from tests.decode.fakes import MOST_SLOTS, KnowingDrafter, drafting, random_adapter
from tests.tiny import tiny_model

PROMPT = [3, 5, 7, 9, 11, 3, 5, 7, 2, 40, 41]
N_TOKENS = 16
AT_THE_SEAMS = {"verify_tail", "small_m_qmm", "block_attention", "gated_lora", "lm_head_pick"}


@pytest.fixture
def forced(monkeypatch: pytest.MonkeyPatch) -> Iterator[Dispatcher]:
    """The dispatcher that MTP_MLX_KERNELS=force makes."""
    monkeypatch.setenv("MTP_MLX_KERNELS", "force")
    dispatcher = default_dispatcher()
    dispatcher.counts.clear()
    with mslemu.options(mode="fast"):
        yield dispatcher


def attached(kernels: Dispatcher | None, dtype: mx.Dtype, exact: bool = False) -> AttachedModel:
    """A quantised model with heads of 64, as `block_attention` wants them, and an adapter that does something."""
    base = tiny_model(
        "qwen3",
        seed=3,
        hidden_size=64,
        intermediate_size=96,
        head_dim=64,
        num_attention_heads=4,
        tie_word_embeddings=True,
    )
    nn.quantize(base, group_size=32, bits=4)
    adapter = random_adapter(base)
    base.set_dtype(dtype)
    adapter.set_dtype(dtype)
    return attach(base, adapter, kernels, exact)


def tokens(model: AttachedModel, **options: Any) -> list[int]:
    found = mtp_generate_step(PROMPT, model, max_tokens=N_TOKENS, **options)
    return [item.token for item in found]


@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize("layout", ["linear", "quadratic"])
def test_the_same_tokens_by_kernels_and_by_mlx(layout: Any, temperature: float, forced: Dispatcher) -> None:
    sampling = SamplingConfig(temperature=temperature, seed=5)
    policy = FixedPolicy(layout, 2)
    expected = tokens(attached(None, mx.float32), sampling=sampling, policy=policy)
    found = tokens(attached(forced, mx.float32), sampling=sampling, policy=policy)
    assert found == expected
    used = {name for (name, lane), count in forced.counts.items() if lane == "kernel" and count}
    assert used == AT_THE_SEAMS


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_trees_by_kernels_and_by_mlx(temperature: float, forced: Dispatcher) -> None:
    sampling, stats = SamplingConfig(temperature=temperature, seed=5), DecodeStats()
    model = attached(forced, mx.float32)
    expected = tokens(attached(None, mx.float32), sampling=sampling)
    policy = TreePolicy(8, 2, [0.6, 0.6], places_slots=True)
    assert tokens(model, sampling=sampling, policy=policy, stats=stats) == expected
    assert any(layout.startswith("tree") for layout in stats.layouts)
    assert any(key.startswith("verify_tail") and key.endswith("tree") for key in forced.verdicts)


def test_prompts_are_read_by_mlx(forced: Dispatcher) -> None:
    """Up to the first token nothing of ours runs, though the prompt is short enough for every kernel."""
    next(mtp_generate_step(PROMPT, attached(forced, mx.float32), max_tokens=1))
    assert not forced.counts


def test_accepted_drafts_by_kernels(forced: Dispatcher) -> None:
    """With drafts that are mostly right: verification and roll-back, not only rejection."""
    truth = tokens(attached(None, mx.float32))
    stats = DecodeStats()
    with drafting(KnowingDrafter(truth, len(PROMPT), 0.8, seed=1)):
        policy = FixedPolicy("quadratic", MOST_SLOTS - 1)
        found = tokens(attached(forced, mx.float32), policy=policy, stats=stats)
    assert found == truth
    assert stats.steps < 0.8 * N_TOKENS


def test_an_8_bit_cache_by_kernels(forced: Dispatcher) -> None:
    options = {
        "kv_bits": 8,
        "kv_group_size": 32,
        "quantized_kv_start": 0,
        "policy": FixedPolicy("quadratic", 2),
    }
    assert tokens(attached(forced, mx.float32), **options) == tokens(attached(None, mx.float32), **options)
    assert any("8" in key for key in forced.verdicts if key.startswith("block_attention"))


def test_exact_rows_by_kernel(forced: Dispatcher) -> None:
    found = tokens(attached(forced, mx.float32, exact=True), policy=FixedPolicy("quadratic", 2))
    assert found == tokens(attached(None, mx.float32))
    assert forced.counts["row_exact", "kernel"] > 0
