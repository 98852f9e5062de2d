"""Proves that new heads start on states of the residual stream's direction and size, and where they cannot."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from mtp_mlx.decode.loop import mtp_generate_step
from mtp_mlx.decode.policy import ChainPolicy
from mtp_mlx.decode.stats import DecodeStats
from mtp_mlx.drafters.heads.cascade import new_heads
from mtp_mlx.drafters.heads.convention import HeadConvention
from mtp_mlx.drafters.heads.start import layer_input, norm_weight, start_like_trunk
from mtp_mlx.drafters.registry import load_folder
from mtp_mlx.model.attach import attach
from tests.tiny import tiny_model
from tests.train.training import trainer_for

TOKENS = [5, 9, 2, 77, 140, 3, 9, 21]


@pytest.mark.parametrize("architecture", ["llama", "gemma2", "olmo2"])
def test_a_block_starts_on_the_residual_stream(architecture: str) -> None:
    """Without its embedding half, a head's block is given the direction of the trunk's last state before the last
    norm (whose weights are taken out again), as large as what the last layer was given."""
    model = tiny_model(architecture, seed=3)
    trunk = model.model
    heads = new_heads(model, 2, HeadConvention("test"))
    assert start_like_trunk(heads, model, TOKENS)
    given = layer_input(trunk, -1, mx.array([TOKENS]))
    mask = mx.tril(mx.ones((len(TOKENS), len(TOKENS)), dtype=mx.bool_))
    last = np.array(trunk.layers[-1](given, mask, None)[0])
    hidden = trunk(mx.array([TOKENS]))
    head = heads.heads[1]
    fused = np.array(head.fuse(mx.concatenate([mx.zeros_like(hidden), head.norm_hidden(hidden)], axis=-1))[0])
    cosine = (fused * last).sum(-1) / np.linalg.norm(fused, axis=-1) / np.linalg.norm(last, axis=-1)
    assert cosine.min() > 0.99
    size = np.sqrt(np.mean(np.array(given[0]) ** 2, axis=-1))
    found = np.sqrt(np.mean(fused**2, axis=-1))
    assert 0.5 < np.median(found) / np.median(size) < 2
    np.testing.assert_allclose(
        np.array(head.norm_out(mx.array(last))), np.array(hidden[0]), rtol=1e-3, atol=1e-3
    )
    assert type(trunk.layers[-1]) is type(trunk.layers[0]), "the layer is put back"


@pytest.mark.parametrize("architecture", ["gemma3", "nemotron_h"])
def test_where_the_trunk_is_elsewhere(tmp_path: Path, architecture: str) -> None:
    """In the language model of a multimodal model, or under the name `backbone`: new heads start so and train."""
    model = tiny_model(architecture, seed=3)
    assert start_like_trunk(new_heads(model, 1, HeadConvention("test")), model, TOKENS)
    trainer = trainer_for(tmp_path / "heads", model=model, method="mtp-heads", steps=2, warmup=0, heads=2)
    assert trainer.run()
    base = tiny_model(architecture, seed=3)
    source, _ = load_folder(tmp_path / "heads", base)
    stats = DecodeStats()
    steps = mtp_generate_step(
        [5, 9, 2], attach(base, source), max_tokens=8, policy=ChainPolicy(2), stats=stats
    )
    expected = mtp_generate_step([5, 9, 2], attach(tiny_model(architecture, seed=3)), max_tokens=8)
    assert [one.token for one in steps] == [one.token for one in expected] and sum(stats.submitted) > 0


def test_heads_do_not_share_their_start() -> None:
    model = tiny_model("llama", seed=3)
    heads = new_heads(model, 2, HeadConvention("test"))
    start_like_trunk(heads, model, TOKENS)
    before = np.array(model.model.norm.weight)
    heads.heads[0].norm_out.weight[0] = 99.0
    heads.heads[0].norm_hidden.weight[0] = 99.0
    assert heads.heads[1].norm_out.weight[0].item() != 99 != heads.heads[1].norm_hidden.weight[0].item()
    assert np.array_equal(np.array(model.model.norm.weight), before)


def test_a_last_norm_of_another_kind_is_left_alone() -> None:
    model = tiny_model("llama", seed=3)
    model.model.norm = nn.LayerNorm(48)
    assert norm_weight(model.model) is None
    heads = new_heads(model, 1, HeadConvention("test"))
    before = np.array(heads.heads[0].fuse.weight)
    assert not start_like_trunk(heads, model, TOKENS)
    assert np.array_equal(np.array(heads.heads[0].fuse.weight), before)
    identity = new_heads(tiny_model("llama"), 1, HeadConvention("test", output_norm="identity"))
    assert not start_like_trunk(identity, tiny_model("llama"), TOKENS)
