"""Proves that heads are read from Kimi's multi-modal checkpoints, whose language model is nested.

Names have a prefix, and K3's configuration calls its language model "kimi_linear".
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.generate import generate_step
from mlx_lm.utils import load_model

from mtp_mlx import load, stream_generate
from mtp_mlx.convert.heads.plan import find_heads, plan_heads
from mtp_mlx.convert.read.checkpoint import open_checkpoint
from mtp_mlx.decode.stats import DecodeStats
from mtp_mlx.drafters.heads.cascade import MTPHeads
from mtp_mlx.drafters.registry import load_folder
from mtp_mlx.errors import ConversionError
from tests.convert.heads.head_cases import CASES
from tests.convert.heads.head_checkpoints import make
from tests.convert.heads.parity_checkpoints import parity_checkpoint
from tests.convert.heads.parity_families import FAMILIES
from tests.convert.heads.parity_setup import TOKENS, Parity, convert, write_pytorch
from tests.convert.heads.test_forms import check


@pytest.mark.parametrize(
    ("name", "outer", "inner"), [("kimi-k2", "kimi_k25", "kimi_k2"), ("kimi-k3", "kimi_k3", "kimi_linear")]
)
def test_multi_modal_checkpoints(tmp_path: Path, name: str, outer: str, inner: str) -> None:
    made = parity_checkpoint(name, {})
    released = replace(
        made,
        stored={f"language_model.{key}": value for key, value in made.stored.items()}
        | {"vision_tower.patch_embed.proj.weight": np.zeros((4, 4), np.float32)},
        config={"model_type": outer, "text_config": made.config | {"model_type": inner}},
    )
    out = convert(write_pytorch(released, tmp_path / "model"), tmp_path / "out")
    model, _ = load_model(out)
    heads, info = load_folder(out / "mtp", model)
    heads.set_dtype(mx.float32)
    check(Parity(FAMILIES[name], made, out, out / "mtp", model, heads, info))


def test_heads_on_a_trunk_of_k3s_own_form(tmp_path: Path) -> None:
    """With recurrent layers and the mixture of residuals, behind which the state before the last norm is taken."""
    linear = CASES["kimi-k3"].config["linear_attn_config"] | {"kda_layers": [1, 3]}
    made = parity_checkpoint("kimi-k3", {"attn_res_block_size": 2, "linear_attn_config": linear})
    out = convert(write_pytorch(made, tmp_path / "model"), tmp_path / "out")
    model, tokenizer = load(str(out))
    assert isinstance(model.speculator, MTPHeads) and model.speculator.first_hidden == "pre-norm"
    stats, options = DecodeStats(), {"max_tokens": 12, "layout": "linear", "slots": 2}
    found = [item.token for item in stream_generate(model, tokenizer, TOKENS[:9], stats=stats, **options)]
    theirs = generate_step(mx.array(TOKENS[:9]), load_model(out)[0], max_tokens=12)
    assert found == [int(token) for token, _ in theirs][: len(found)] and len(found) > 1
    assert any(name.startswith("2/2 heads") for name in stats.layouts)


def test_weights_of_the_mixture_of_residuals_are_left_out(tmp_path: Path) -> None:
    """A head that was made as a copy of a layer of the trunk has them; no runtime reads them there."""
    made = make("kimi-k3")
    made.stored["model.layers.4.self_attention_res_proj.weight"] = np.ones((1, 48), np.float32)
    made.stored["model.layers.4.mlp_res.norm_weight"] = np.ones(48, np.float32)
    checkpoint = open_checkpoint(made.write(tmp_path / "model"))
    plan = plan_heads(checkpoint, find_heads(checkpoint))
    assert {target.name for target in plan.targets} == made.canonical.keys()


def test_kimi_linear_is_refused_in_a_sentence(tmp_path: Path) -> None:
    folder = make("kimi-k3").write(tmp_path / "model", model_type="kimi_linear", hidden_act="silu")
    with pytest.raises(ConversionError, match="MTP heads of Kimi Linear are not known"):
        find_heads(open_checkpoint(folder))
