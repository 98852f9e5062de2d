"""Proves that a folder of MTP heads, converted or saved here, comes back for its own base, or says why not."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm.models import mimo

from mtp_mlx.adapter_folder import Header, read_header
from mtp_mlx.cli.info import adapter
from mtp_mlx.decode.loop import mtp_generate_step
from mtp_mlx.decode.policy import ChainPolicy
from mtp_mlx.decode.stats import DecodeStats
from mtp_mlx.drafters.heads.cascade import MTPHeads, new_heads
from mtp_mlx.drafters.heads.convention import HeadConvention
from mtp_mlx.drafters.heads.folder import LAST_LAYER, HeadsConfig, config_of, heads_header
from mtp_mlx.drafters.heads.folder import save as save_heads
from mtp_mlx.drafters.registry import load_folder
from mtp_mlx.errors import MTPError
from mtp_mlx.model.attach import attach
from mtp_mlx.model.fingerprint import base_fingerprint
from tests.convert.conversions import heads_folder
from tests.convert.heads.head_checkpoints import make, numbers
from tests.drafters.heads.test_mtp_head import random_heads
from tests.tiny import DENSE_ARCHITECTURES, tiny_config, tiny_model

DRAFT_IDS = mx.array([3, 9, 64, 100], dtype=mx.int32)


def written(folder: Path, model: Any, drafts: int = 0) -> tuple[MTPHeads, Header]:
    """Two random heads of `model`, saved in `folder`."""
    convention = HeadConvention("test", recycled_hidden="raw", unsettled=("first_hidden",))
    heads = random_heads(model, 2, convention)
    heads = MTPHeads(heads.heads, convention, DRAFT_IDS, drafts)
    info = heads_header(
        HeadsConfig(convention, [dict(LAST_LAYER)] * 2, drafts=drafts),
        "tiny",
        base_fingerprint(model),
        training={"steps": 7},
        acceptance=[0.5, 0.25],
    )
    save_heads(folder, heads, info)
    return heads, info


def parameters(heads: MTPHeads) -> dict[str, mx.array]:
    return dict(tree_flatten(heads.parameters()))  # type: ignore[arg-type]


@pytest.mark.parametrize("architecture", DENSE_ARCHITECTURES)
def test_round_trip(tmp_path: Path, architecture: str) -> None:
    model = tiny_model(architecture, seed=3)
    heads, info = written(tmp_path / "heads", model, drafts=5)
    found, found_info = load_folder(tmp_path / "heads", model)
    assert found_info.to_json() == info.to_json() and found.drafts == 5
    assert found.convention == heads.convention
    assert found.draft_ids is not None and mx.array_equal(found.draft_ids, DRAFT_IDS)
    own, theirs = parameters(heads), parameters(found)
    assert own.keys() == theirs.keys()
    for name, value in own.items():
        assert mx.array_equal(theirs[name], value.astype(mx.bfloat16)), name


def test_a_card_and_a_description(tmp_path: Path) -> None:
    model = tiny_model("llama", seed=3)
    written(tmp_path / "heads", model)
    card = (tmp_path / "heads" / "README.md").read_text()
    assert "2 head(s) that draft 2 token(s)" in card and "0.50 / 0.25" in card
    facts = adapter(tmp_path / "heads")
    assert facts["heads"] == 2 and facts["family"] == "test" and facts["acceptance"] == [0.5, 0.25]


def converted(tmp_path: Path) -> tuple[Path, Any]:
    """Heads of a tiny MiMo checkpoint, as `convert --heads-only` writes them, and their trunk."""
    made = make("mimo-7b")
    mx.random.seed(3)
    model = mimo.Model(mimo.ModelArgs.from_dict(made.config))
    for name, value in tree_flatten(model.parameters()):
        made.stored[name] = np.array(value) if "norm" not in name else numbers(name, value.shape)
    out = heads_folder(made.write(tmp_path / "model"), tmp_path / "heads")
    model.load_weights([(name, mx.array(value)) for name, value in made.stored.items() if "mtp" not in name])
    return out, model


def test_converted_heads_load(tmp_path: Path) -> None:
    folder, model = converted(tmp_path)
    heads, info = load_folder(folder, model)
    blocks = config_of(folder, info).blocks
    assert heads.convention.family == "mimo" and heads.drafts == len(heads.heads) == len(blocks)
    for name, value in make("mimo-7b").canonical.items():
        np.testing.assert_array_equal(np.array(parameters(heads)[name]), value, err_msg=name)
    ids = mx.array([[5, 9, 2, 7, 14]])
    assert heads.cascade(model.model.embed_tokens(ids), model.model(ids))[0].shape == (1, 4, 48)


@pytest.mark.parametrize("drafts", [1, 3])
def test_converted_heads_decode(tmp_path: Path, drafts: int) -> None:
    """Released heads, and one applied again in turn: drafts are made, and the text is that of plain decoding."""
    folder, model = converted(tmp_path)
    heads, _ = load_folder(folder, model)
    attached = attach(model, heads)
    stats = DecodeStats()
    plain = [item.token for item in mtp_generate_step([3, 1, 4, 1, 5], attached, max_tokens=20)]
    steps = mtp_generate_step(
        [3, 1, 4, 1, 5], attached, max_tokens=20, policy=ChainPolicy(drafts), stats=stats
    )
    assert [item.token for item in steps] == plain
    assert len(stats.submitted) == drafts and stats.layouts[f"{drafts}/{drafts} heads"] > 5


def test_another_base_is_refused(tmp_path: Path) -> None:
    written(tmp_path / "heads", tiny_model("llama", seed=3))
    with pytest.raises(MTPError, match=r"made for base 'tiny' \(fingerprint [0-9a-f]{16}\)"):
        load_folder(tmp_path / "heads", tiny_model("llama", seed=4))


def test_an_unknown_base_is_taken_with_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = tiny_model("llama", seed=3)
    written(tmp_path / "heads", model)
    change(tmp_path / "heads", lambda raw: raw["base"].update(fingerprint=None))
    with caplog.at_level("WARNING", "mtp_mlx"):
        load_folder(tmp_path / "heads", model)
    assert "does not say which base" in caplog.text


def change(folder: Path, edit: Callable[[dict[str, Any]], Any]) -> None:
    """Edits a folder's config."""
    path = folder / "mtp_config.json"
    raw = json.loads(path.read_text())
    edit(raw)
    path.write_text(json.dumps(raw))


CONVENTIONS = [
    ("kind", "hydra"),
    ("first_hidden", "before the embedding"),
    ("recycled_hidden", "none"),
    ("output_norm", "none"),
    ("embedding", "something else"),
]


@pytest.mark.parametrize(("name", "value"), CONVENTIONS)
def test_kinds_that_nothing_runs_yet(tmp_path: Path, name: str, value: str) -> None:
    model = tiny_model("llama", seed=3)
    written(tmp_path / "heads", model)
    change(tmp_path / "heads", lambda raw: raw["heads"]["convention"].update({name: value}))
    with pytest.raises(MTPError, match=f"are not supported yet: their {name.replace('_', ' ')} is '{value}'"):
        load_folder(tmp_path / "heads", model)


def test_heads_with_two_attentions_are_refused(tmp_path: Path) -> None:
    """A folder that the converter writes, not one made up here."""
    made = make("nemotron-h")
    out = heads_folder(made.write(tmp_path / "model"), tmp_path / "heads")
    change(out, lambda raw: raw["heads"]["blocks"][0]["layers"].append({"block_type": "*"}))
    with pytest.raises(MTPError, match="are not supported yet: each has several layers with attention"):
        load_folder(out, tiny_model("llama", seed=3))


BLOCK = {"module": "mlx_lm.models.llama", "class": "TransformerBlock", "args_class": "ModelArgs"}
CALLED = BLOCK | {"class": "create_attention_mask", "layers": [{}]}
DAMAGE: list[tuple[Callable[[dict[str, Any]], Any], str]] = [
    (lambda raw: raw.update(format=9), "has format 9, and this version of mtp-mlx reads format 1"),
    (lambda raw: raw.pop("heads"), "is damaged: it has no 'heads'"),
    (lambda raw: raw["heads"].update(count=3), "3 heads, but 2 blocks"),
    (lambda raw: raw["heads"]["convention"].update(colour="red"), "is damaged"),
    (lambda raw: raw["heads"]["convention"].update(kind=["cascade"]), "the convention's kind is"),
    (lambda raw: raw["heads"]["convention"].update(zero_centred_norms="no"), "zero_centred_norms is 'no'"),
    (lambda raw: raw["heads"].update(blocks=[3, 4]), "a head's block is not a JSON object"),
    *(
        (lambda raw, layers=layers: raw["heads"]["blocks"][1].update(like="last layers", layers=layers), "has layers")
        for layers in ("x", None, 0, 2.5, True, [])
    ),
    (lambda raw: raw["heads"].update(drafts=10**9), "draft 1000000000 tokens a step"),
    (lambda raw: raw["heads"].update(drafts=-1), "draft -1 tokens a step"),
    (lambda raw: raw["heads"].update(drafts=float("inf")), "is damaged"),
    (lambda raw: raw["base"].update(name=3), "is damaged: 'name' is 3"),
    (lambda raw: raw.update(acceptance=["high"]), "'acceptance' is .'high'., not a list of numbers"),
    (lambda raw: raw["heads"].update(blocks=[{}, {}]), "block cannot be built"),
    (
        lambda raw: raw["heads"].update(blocks=[{**BLOCK, "module": "os", "layers": [{}], "overrides": {}}] * 2),
        "os is not a module of mlx_lm.models",
    ),
    (
        lambda raw: raw["heads"].update(blocks=[{**CALLED, "overrides": tiny_config("llama")}] * 2),
        "create_attention_mask is not a layer",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("edit", "message"), DAMAGE)
def test_damage_is_one_sentence(tmp_path: Path, edit: Callable[[Any], Any], message: str) -> None:
    model = tiny_model("llama", seed=3)
    written(tmp_path / "heads", model)
    change(tmp_path / "heads", edit)
    with pytest.raises(MTPError, match=message) as error:
        load_folder(tmp_path / "heads", model)
    assert len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize("layers", ["x", None, 0, 2.5, []], ids=str)
def test_info_of_a_damaged_block_is_one_sentence(tmp_path: Path, layers: Any) -> None:
    written(tmp_path / "heads", tiny_model("llama", seed=3))
    change(tmp_path / "heads", lambda raw: raw["heads"]["blocks"][1].update(layers=layers))
    with pytest.raises(MTPError, match="is damaged: a head's block has layers"):
        adapter(tmp_path / "heads")


def test_tensors_that_do_not_fit_are_all_named(tmp_path: Path) -> None:
    model = tiny_model("llama", seed=3)
    written(tmp_path / "heads", model)
    path = tmp_path / "heads" / "mtp.safetensors"
    tensors = dict(mx.load(str(path)))  # type: ignore[call-overload]
    mx.eval(tensors)
    del tensors["heads.0.fuse.weight"]
    tensors["heads.1.norm_out.weight"] = mx.zeros((3,))
    tensors["heads.2.norm_out.weight"] = mx.zeros((48,))
    mx.save_safetensors(str(path), tensors)
    message = r"missing heads.0.fuse.weight \(48, 96\); unexpected heads.2.norm_out.weight \(48,\); heads.1.norm_out"
    with pytest.raises(MTPError, match=message):
        load_folder(tmp_path / "heads", model)


def test_missing_weights(tmp_path: Path) -> None:
    model = tiny_model("llama", seed=3)
    written(tmp_path / "heads", model)
    (tmp_path / "heads" / "mtp.safetensors").unlink()
    with pytest.raises(MTPError, match="mtp.safetensors is missing or damaged"):
        load_folder(tmp_path / "heads", model)


def test_a_mask_adapter_is_no_heads(tmp_path: Path) -> None:
    (tmp_path / "mtp_config.json").write_text(
        json.dumps({"format": 1, "method": "mask-tokens", "base": {"name": "x", "fingerprint": None}})
    )
    with pytest.raises(MTPError, match="of the method 'mask-tokens', not 'mtp-heads'"):
        config_of(tmp_path, read_header(tmp_path))


def test_depths_beyond_the_last_head_begin_again() -> None:
    model = tiny_model("llama", seed=3)
    heads = MTPHeads(new_heads(model, 2, HeadConvention("test")).heads, HeadConvention("test"), None, 5)
    assert heads.drafts == 5
    assert all(heads.at_depth(depth) is heads.heads[(depth - 1) % 2] for depth in range(1, 6))
    assert heads.heads[0] is not heads.heads[1]
