"""Proves that the adapter folder of heads is whole, exact and says all that a runtime needs, or is not there."""

from __future__ import annotations

import json
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm.models import mimo

from mtp_mlx.cli.info import adapter
from mtp_mlx.convert.heads.report import describe
from mtp_mlx.convert.read.checkpoint import open_checkpoint
from mtp_mlx.errors import MTPError
from mtp_mlx.model.fingerprint import base_fingerprint, sample_base
from tests.convert.checkpoints import bf16, write_safetensors
from tests.convert.conversions import heads_folder
from tests.convert.heads.head_cases import CASES
from tests.convert.heads.head_checkpoints import make, numbers


def write(source: Path, out: Path, force: bool = False) -> Path:
    """Convert the heads of `source`."""
    return heads_folder(source, out, force=force)


@pytest.mark.parametrize("name", list(CASES))
def test_the_folder_holds_the_canonical_tensors(tmp_path: Path, name: str) -> None:
    made = make(name)
    out = write(made.write(tmp_path / "model"), tmp_path / "heads")
    assert sorted(file.name for file in out.iterdir()) == ["README.md", "mtp.safetensors", "mtp_config.json"]
    loaded = mx.load(str(out / "mtp.safetensors"))
    assert loaded.keys() == made.canonical.keys()
    for key, value in made.canonical.items():
        np.testing.assert_array_equal(np.array(loaded[key]), value, err_msg=key)
    config = json.loads((out / "mtp_config.json").read_text())
    assert (config["format"], config["method"]) == (1, "mtp-heads")
    assert config["base"]["name"] == "model" and config["heads"]["count"] == CASES[name].heads
    assert config["heads"]["convention"]["family"] == CASES[name].family
    assert len(config["heads"]["blocks"]) == CASES[name].heads
    assert str(tmp_path) not in (out / "mtp_config.json").read_text() + (out / "README.md").read_text()
    facts = adapter(out)
    assert facts["weights"] == sum(value.size for value in made.canonical.values())
    assert (
        list(tmp_path.iterdir()) == [tmp_path / "model", tmp_path / "heads"]
        or len(list(tmp_path.iterdir())) == 2
    )


def test_bfloat16_stays_bfloat16(tmp_path: Path) -> None:
    made = make("mimo-7b")
    (tmp_path / "model").mkdir()
    stored = {name: bf16(value) for name, value in made.stored.items()}
    write_safetensors(tmp_path / "model" / "model.safetensors", stored, dict.fromkeys(stored, "BF16"))
    (tmp_path / "model" / "config.json").write_text(json.dumps(made.config))
    loaded = mx.load(str(write(tmp_path / "model", tmp_path / "heads") / "mtp.safetensors"))
    for key, value in made.canonical.items():
        assert loaded[key].dtype == mx.bfloat16
        np.testing.assert_array_equal(np.array(loaded[key].astype(mx.float32)), value, err_msg=key)


def test_the_fingerprint_is_that_of_the_trunk(tmp_path: Path) -> None:
    """mlx-lm drops MiMo's heads itself, so the trunk loads from the folder that has both."""
    made = make("mimo-7b")
    mx.random.seed(3)
    model = mimo.Model(mimo.ModelArgs.from_dict(made.config))
    for name, value in tree_flatten(model.parameters()):
        made.stored[name] = np.array(value) if "norm" not in name else numbers(name, value.shape)
    source = made.write(tmp_path / "model")
    out = write(source, tmp_path / "heads")
    base = json.loads((out / "mtp_config.json").read_text())["base"]
    model.load_weights([(name, mx.array(value)) for name, value in made.stored.items() if "mtp" not in name])
    expected = {
        "name": "model",
        "fingerprint": base_fingerprint(model),
        "sample": sample_base(model).to_json(),
    }
    assert base == expected
    assert base["fingerprint"] in (out / "README.md").read_text()


def test_heads_without_a_trunk_have_no_fingerprint(tmp_path: Path) -> None:
    made = make("speculators, qwen3")
    out = write(made.write(tmp_path / "model"), tmp_path / "heads")
    assert json.loads((out / "mtp_config.json").read_text())["base"]["fingerprint"] is None
    card = (out / "README.md").read_text()
    assert "fingerprint not known" in card and "mlx-lm cannot load the trunk (" in card


def test_the_card_tells_the_convention_and_what_was_dropped(tmp_path: Path) -> None:
    card = (write(make("deepseek-v3").write(tmp_path / "m"), tmp_path / "heads") / "README.md").read_text()
    assert "- model.layers.4.embed_tokens.weight = model.embed_tokens.weight" in card
    assert "- mask first position: yes" in card and "- unsettled: mask first position" in card
    card = (
        write(make("qwen3-next experts").write(tmp_path / "q"), tmp_path / "h2") / "README.md"
    ).read_text()
    assert "norms are stored around zero, 1 is added to each (the trunk's convolutions have the" in card


def test_an_existing_folder_stays_unless_forced(tmp_path: Path) -> None:
    source = make("mimo-7b").write(tmp_path / "model")
    out = write(source, tmp_path / "heads")
    (out / "mine.txt").write_text("x")
    with pytest.raises(MTPError, match="exists already"):
        write(source, out)
    assert (out / "mine.txt").exists()
    write(source, out, force=True)
    assert not (out / "mine.txt").exists()
    with pytest.raises(MTPError, match="not an adapter folder"):
        write(source, source, force=True)
    assert (source / "model.safetensors").exists()


def test_nothing_is_left_when_writing_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = make("mimo-7b").write(tmp_path / "model")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("mtp_mlx.convert.heads.write.model_card", full)
    with pytest.raises(MTPError, match="disk is full"):
        write(source, tmp_path / "heads")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_peft_adapter_is_no_adapter_by_itself(tmp_path: Path) -> None:
    (tmp_path / "lora").mkdir()
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_"
    stored = {f"{name}A.weight": numbers("a", (8, 48)), f"{name}B.weight": numbers("b", (64, 8))}
    write_safetensors(tmp_path / "lora" / "adapter_model.safetensors", stored)
    with pytest.raises(MTPError, match="this is a PEFT adapter, which has no MTP heads"):
        write(tmp_path / "lora", tmp_path / "heads")
    assert not (tmp_path / "heads").exists()


def test_what_a_checkpoint_is(tmp_path: Path) -> None:
    made = make("glm-4.5")
    facts = describe(open_checkpoint(made.write(tmp_path / "model")))
    assert facts["tensors"] == len(made.stored) and facts["types"] == f"{len(made.stored)} F32"
    assert (
        facts["mtp heads"]["family"] == "GLM-4.5 / 4.6 / 4.7-Flash / 5" and facts["mtp heads"]["count"] == 1
    )
    assert facts["mtp heads"]["convention"]["mask first position"] is True
    write_safetensors(tmp_path / "plain.safetensors", {"model.norm.weight": numbers("n", (48,))})
    assert describe(open_checkpoint(tmp_path / "plain.safetensors"))["mtp heads"] == "none"
