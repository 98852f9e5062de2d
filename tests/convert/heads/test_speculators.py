"""Proves that heads survive the way into the speculators layout and back, bit for bit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

from mtp_mlx.convert.heads.plan import Overrides
from mtp_mlx.convert.heads.speculators import export_speculators
from mtp_mlx.convert.read.checkpoint import open_checkpoint
from mtp_mlx.convert.read.safetensors import read_safetensors
from mtp_mlx.drafters.heads.build import block_spec
from mtp_mlx.drafters.heads.cascade import new_heads
from mtp_mlx.drafters.heads.convention import HeadConvention
from mtp_mlx.drafters.heads.folder import LAST_LAYER, HeadsConfig, heads_header
from mtp_mlx.drafters.heads.folder import save as save_heads
from mtp_mlx.errors import MTPError
from mtp_mlx.model.fingerprint import base_fingerprint
from tests.convert.conversions import heads_folder, plan, speculators_folder
from tests.convert.heads.head_checkpoints import make
from tests.tiny import tiny_config, tiny_model

HOLDS = [
    "qwen3-next experts",
    "qwen3-next dense",
    "qwen3.5 dense",
    "qwen3.5 experts, fused",
    "llama with own heads",
    "mimo-7b",
    "speculators, qwen3-next",
    "speculators, qwen3",
]


@pytest.mark.parametrize("name", HOLDS)
def test_there_and_back(tmp_path: Path, name: str) -> None:
    made = make(name)
    out = speculators_folder(made.write(tmp_path / "model"), tmp_path / "out")
    planned, stored = plan(out), open_checkpoint(out).tensors
    assert planned.convention.family == "speculators"
    found = {target.name: target.build(stored) for target in planned.targets}
    assert found.keys() == made.canonical.keys()
    for key, value in made.canonical.items():
        np.testing.assert_array_equal(found[key], value, err_msg=key)


def test_names_order_and_norms_of_the_layout(tmp_path: Path) -> None:
    made = make("qwen3-next experts")
    out = speculators_folder(made.write(tmp_path / "model"), tmp_path / "out", base_name="org/base")
    stored = mx.load(str(out / "model.safetensors"))
    for name, key in (
        ("input_proj", "mtp.fc"),
        ("token_layernorm", "mtp.pre_fc_norm_embedding"),
        ("hidden_layernorm", "mtp.pre_fc_norm_hidden"),
        ("final_layernorm", "mtp.norm"),
        ("self_attn.q_norm", "mtp.layers.0.self_attn.q_norm"),
        ("mlp.shared_expert_gate", "mtp.layers.0.mlp.shared_expert_gate"),
    ):
        np.testing.assert_array_equal(
            np.array(stored[f"mtp_layers.0.{name}.weight"]), made.stored[f"{key}.weight"]
        )
    fused = np.array(stored["mtp_layers.0.mlp.experts.gate_up_proj"])
    for e in range(3):
        expert = f"mtp.layers.0.mlp.experts.{e}."
        np.testing.assert_array_equal(fused[e, :24], made.stored[f"{expert}gate_proj.weight"])
        np.testing.assert_array_equal(fused[e, 24:], made.stored[f"{expert}up_proj.weight"])
    assert not [name for name in stored if "embed" in name or "lm_head" in name]
    config = json.loads((out / "config.json").read_text())
    assert config["speculators_config"]["verifier"]["name_or_path"] == "org/base"
    assert config["transformer_layer_config"]["model_type"] == "qwen3_next"


def test_norms_that_an_earlier_conversion_changed(tmp_path: Path) -> None:
    """Of a file whose norms have 1 added already, as `head_norms` says, it is taken off again."""
    made = make("qwen3-next dense")
    source = made.write(tmp_path / "model")
    out = speculators_folder(source, tmp_path / "out", Overrides(head_norms="plain"))
    stored: Any = mx.load(str(out / "model.safetensors"))
    for name, key in (("final_layernorm", "mtp.norm"), ("self_attn.k_norm", "mtp.layers.0.self_attn.k_norm")):
        np.testing.assert_array_equal(
            np.array(stored[f"mtp_layers.0.{name}.weight"]), made.stored[f"{key}.weight"] - 1
        )


@pytest.mark.parametrize("name", ["deepseek-v3", "ernie-4.5", "nemotron-h", "step-3.5"])
def test_other_forms_are_refused(tmp_path: Path, name: str) -> None:
    source = make(name).write(tmp_path / "model")
    with pytest.raises(MTPError, match="the speculators layout is for heads of the form of"):
        speculators_folder(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_existing_folder_stays_unless_forced(tmp_path: Path) -> None:
    source = make("mimo-7b").write(tmp_path / "model")
    speculators_folder(source, tmp_path / "out")
    with pytest.raises(MTPError, match="exists already"):
        speculators_folder(source, tmp_path / "out")
    speculators_folder(source, tmp_path / "out", force=True)
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.jpg").write_text("x")
    with pytest.raises(MTPError, match="not a model folder"):
        speculators_folder(source, tmp_path / "photos", force=True)


def test_the_rest_of_the_convention_comes_back(tmp_path: Path) -> None:
    """MiMo-7B's heads take the state before the norm, and zeros at position 0: other runtimes' folders do not."""
    out = speculators_folder(make("mimo-7b").write(tmp_path / "m"), tmp_path / "out")
    found = plan(out).convention
    assert (found.first_hidden, found.mask_first_position) == ("pre-norm", True)
    config = json.loads((out / "config.json").read_text())
    written = config.pop("mtp_mlx_convention")
    (out / "config.json").write_text(json.dumps(config))
    found = plan(out).convention
    assert (found.first_hidden, found.mask_first_position) == ("post-norm", False)
    (out / "config.json").write_text(
        json.dumps(config | {"mtp_mlx_convention": written | {"first_hidden": 3}})
    )
    with pytest.raises(MTPError, match="mtp_mlx_convention has first_hidden 3, which is not known"):
        plan(out)


# --- from adapter folders -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", HOLDS)
def test_from_an_adapter_folder_it_is_the_same_file(tmp_path: Path, name: str) -> None:
    """Checkpoint -> adapter -> layout gives what checkpoint -> layout gives, to the byte."""
    source = make(name).write(tmp_path / "model")
    direct = speculators_folder(source, tmp_path / "direct")
    adapter = heads_folder(source, tmp_path / "adapter")
    out = export_speculators(adapter, tmp_path / "out")
    expected, found = (read_safetensors(path / "model.safetensors") for path in (direct, out))
    assert expected.keys() == found.keys()
    for key, tensor in expected.items():
        np.testing.assert_array_equal(found[key].load(), tensor.load(), err_msg=key)
    assert (out / "config.json").read_text() == (direct / "config.json").read_text().replace(
        json.dumps(open_checkpoint(source).config.get("architectures", [])), "[]"
    )


def test_heads_that_were_trained_here(tmp_path: Path) -> None:
    """Their blocks are copies of the base's last layer, so the base's configuration is needed."""
    model = tiny_model("qwen3", seed=3)
    convention = HeadConvention("trained")
    heads = new_heads(model, 2, convention, mx.array([3, 9], dtype=mx.int32))
    info = heads_header(HeadsConfig(convention, [dict(LAST_LAYER)] * 2), "tiny", base_fingerprint(model))
    save_heads(tmp_path / "heads", heads, info, mx.float32)
    with pytest.raises(MTPError, match="give `base`, the base model"):
        export_speculators(tmp_path / "heads", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    out = export_speculators(tmp_path / "heads", tmp_path / "out", base=tiny_config("qwen3"))
    planned, stored = plan(out), open_checkpoint(out).tensors
    own = {name: np.array(value) for name, value in tree_flatten(heads.parameters())}
    found = {target.name: target.build(stored) for target in planned.targets}
    assert planned.count == 2 and own.keys() == found.keys()
    for name, value in own.items():
        np.testing.assert_array_equal(found[name], value, err_msg=name)


def test_copies_of_another_layer_than_the_last(tmp_path: Path) -> None:
    """As of a hybrid whose last layer keeps recurrent state."""
    model = tiny_model("qwen3_next", seed=3, num_hidden_layers=3)
    convention = HeadConvention("trained")
    spec = block_spec(model.model, 1)
    info = heads_header(HeadsConfig(convention, [spec]), "tiny", base_fingerprint(model))
    save_heads(tmp_path / "heads", new_heads(model, 1, convention), info, mx.float32)
    with pytest.raises(MTPError, match="are copies of another layer than the last"):
        export_speculators(tmp_path / "heads", tmp_path / "out", base=tiny_config("qwen3_next"))


def test_adapters_of_another_form_are_refused(tmp_path: Path) -> None:
    adapter = heads_folder(make("ernie-4.5").write(tmp_path / "model"), tmp_path / "adapter")
    with pytest.raises(MTPError, match="the speculators layout is for heads of the form of"):
        export_speculators(adapter, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("said", "drafts"), [(3, 3), (0, 0), ("many", 0), (None, 0)])
def test_tokens_that_the_layer_was_trained_to_draft(tmp_path: Path, said: Any, drafts: int) -> None:
    out = speculators_folder(make("mimo-7b").write(tmp_path / "m"), tmp_path / "out")
    assert plan(out).drafts == 1
    config = json.loads((out / "config.json").read_text())
    config["speculators_config"]["proposal_methods"] = (
        [{"speculative_tokens": said}] if said is not None else []
    )
    (out / "config.json").write_text(json.dumps(config))
    assert plan(out).drafts == drafts
    config["speculators_config"]["proposal_methods"] = [{"speculative_tokens": 10**9}]
    (out / "config.json").write_text(json.dumps(config))
    with pytest.raises(MTPError, match="1000000000 drafts in a step"):
        plan(out)
