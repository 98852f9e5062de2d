"""Proves that heads are read in every form they are found in, and that quantised ones run quantised.

Logits, and the drafts of decoding steps, are those of the numpy oracle over the values that the form stands for.
"""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from click.testing import CliRunner
from mlx_lm.models.switch_layers import QuantizedSwitchLinear

from mtp_mlx.adapter_folder import tensor_sizes
from mtp_mlx.cli import main
from mtp_mlx.convert.heads.copies import without_copies
from mtp_mlx.convert.heads.families import Found
from mtp_mlx.convert.heads.plan import find_heads, plan_heads
from mtp_mlx.convert.read.checkpoint import Checkpoint, open_checkpoint
from mtp_mlx.convert.read.lazy_tensor import LazyTensor
from mtp_mlx.drafters.heads.convention import HeadConvention
from mtp_mlx.errors import ConversionError
from tests.convert.heads.form_checkpoints import WIDTH, Forms, plain, quantised, save, stacked
from tests.convert.heads.parity_checkpoints import parity_checkpoint
from tests.convert.heads.parity_setup import (
    TOLERANCE,
    Parity,
    convert,
    convert_heads,
    drafts_of_two_steps,
    worst,
    write_pytorch,
)
from tests.tiny import tiny_model

AFFINE = {"group_size": 32, "mode": "affine"}
SIDECARS = ["mtp.safetensors", "mtp/weights.safetensors", "model-mtp.safetensors"]


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Forms:
    with pytest.MonkeyPatch.context() as patch:
        return Forms.of("qwen3.5 dense", tmp_path_factory.mktemp("dense"), patch)


@pytest.fixture(scope="module")
def experts(tmp_path_factory: pytest.TempPathFactory) -> Forms:
    with pytest.MonkeyPatch.context() as patch:
        return Forms.of("qwen3.5 experts, fused", tmp_path_factory.mktemp("experts"), patch)


def check(parity: Parity) -> Parity:
    """Logits and drafts are the oracle's."""
    found, expected = parity.logits, parity.expected()
    assert np.std(expected[0]) > 0.3 and worst(found, expected) < TOLERANCE
    drafted, wanted = drafts_of_two_steps(parity)
    assert drafted == wanted
    return parity


@pytest.mark.parametrize("norms", ["plain", "around zero"])
def test_split_from_the_model(dense: Forms, tmp_path: Path, norms: str) -> None:
    """mlx-vlm adds 1 to norms where it splits an original; others copy them as they are."""
    tensors = plain(dense.heads) if norms == "plain" else dense.heads
    folder = convert_heads(dense.split(tmp_path / "split", tensors), tmp_path / "heads")
    parity = check(dense.parity(folder))
    assert "q and k norms" in str(parity.info.source["notes"])
    other = dense.parity(
        convert_heads(
            tmp_path / "split",
            tmp_path / "other",
            "--head-norms",
            "zero-centred" if norms == "plain" else "plain",
        )
    )
    assert worst(other.logits, other.expected()) > 100 * TOLERANCE


def test_norms_around_zero_in_the_layers_alone(dense: Forms, tmp_path: Path) -> None:
    """As half-converted heads have them."""
    whole = plain(dense.heads)
    mixed = {name: dense.heads[name] if ".layers." in name else whole[name] for name in whole}
    source = dense.split(tmp_path / "split", mixed)
    check(dense.parity(convert_heads(source, tmp_path / "heads", "--head-norms", "mixed")))


@pytest.mark.parametrize(
    "how",
    [{"bits": {"": 4}} | AFFINE, {"bits": {"": 4, "fc.weight": 8, "down_proj.weight": 3}} | AFFINE]
    + [{"bits": {"": bits}, "group_size": size, "mode": mode}
       for bits, size, mode in ((4, 32, "mxfp4"), (8, 32, "mxfp8"), (4, 16, "nvfp4"))],
    ids=["4 bits", "mixed", "mxfp4", "mxfp8", "nvfp4"],
)  # fmt: skip
def test_split_and_quantised(dense: Forms, tmp_path: Path, how: dict[str, object]) -> None:
    """Every matrix runs in the bits it is stored in, whatever config.json says."""
    packed, meant = quantised(plain(dense.heads), **how)  # type: ignore[arg-type]
    source = dense.split(tmp_path / "split", packed, quantization={"group_size": 128, "bits": 2})
    parity = check(dense.parity(convert_heads(source, tmp_path / "heads"), meant))
    head = parity.heads.heads[0]
    bits = how["bits"]
    assert isinstance(bits, dict)
    assert isinstance(head.fuse, nn.QuantizedLinear) and head.fuse.mode == how["mode"]
    assert head.fuse.bits == bits.get("fc.weight", bits[""])
    assert head.block.mlp.down_proj.bits == bits.get("down_proj.weight", bits[""])


def test_experts_split_and_quantised(experts: Forms, tmp_path: Path) -> None:
    packed, _ = quantised(stacked(plain(experts.heads)), {"": 4}, **AFFINE)
    _, meant = quantised(experts.heads, {"": 4}, **AFFINE)
    folder = convert_heads(experts.split(tmp_path / "split", packed), tmp_path / "heads")
    parity = check(experts.parity(folder, meant))
    assert isinstance(parity.heads.heads[0].block.mlp.switch_mlp.up_proj, QuantizedSwitchLinear)


@pytest.mark.parametrize("norms", ["plain", "around zero"])
def test_quantised_inside_the_model(dense: Forms, tmp_path: Path, norms: str) -> None:
    """Beside a trunk that mlx-lm converted, whose norms tell how the heads' are stored."""
    packed, meant = quantised(plain(dense.heads) if norms == "plain" else dense.heads, {"": 4}, **AFFINE)
    source = tmp_path / "model"
    source.mkdir()
    trunk = {name: np.array(value) for name, value in mx.load(str(dense.trunk / "model.safetensors")).items()}
    save(source / "model.safetensors", trunk | {f"language_model.{name}": packed[name] for name in packed})
    (source / "config.json").write_text((dense.trunk / "config.json").read_text())
    parity = check(dense.parity(convert_heads(source, tmp_path / "heads"), meant))
    assert parity.info.base_fingerprint is not None  # of the trunk beside them


@pytest.mark.parametrize("names", ["mtp.*", "bare"])
@pytest.mark.parametrize("file", SIDECARS)
def test_in_a_file_beside_the_index(dense: Forms, tmp_path: Path, file: str, names: str) -> None:
    source = tmp_path / "model"
    (source / file).parent.mkdir(parents=True)
    for path in dense.trunk.iterdir():
        (source / path.name).write_bytes(path.read_bytes())
    prefix = "mtp." if names == "mtp.*" else ""
    save(source / file, {prefix + name.removeprefix("mtp."): v for name, v in dense.heads.items()})
    assert (source / "model.safetensors.index.json").is_file()
    parity = dense.parity(convert_heads(source, tmp_path / "heads"))
    assert worst(parity.logits, parity.expected()) < TOLERANCE
    assert parity.info.base_fingerprint is not None and file in parity.info.source["files"]


def test_a_named_file_is_read_and_one_outside_is_not(dense: Forms, tmp_path: Path) -> None:
    source = tmp_path / "model"
    source.mkdir()
    for path in dense.trunk.iterdir():
        (source / path.name).write_bytes(path.read_bytes())
    config = json.loads((source / "config.json").read_text())
    for named, where, found in (("own.safetensors", source, True), ("../own.safetensors", tmp_path, False)):
        save(where / "own.safetensors", dense.heads)
        (source / "config.json").write_text(
            json.dumps(config | {"mlx_lm_extra_tensors": {"mtp_file": named}})
        )
        checkpoint = open_checkpoint(source)
        assert ("mtp.fc.weight" in checkpoint.tensors) == found
        (where / "own.safetensors").unlink()


def test_what_mlx_does_not_know_is_a_sentence(dense: Forms, tmp_path: Path) -> None:
    packed, _ = quantised(plain(dense.heads), {"": 4}, **AFFINE)
    damage = {
        "is quantised only in part": ("mtp.fc.weight", None),
        "no quantisation of [64, 128] that mlx knows": ("mtp.fc.scales", np.zeros((64, 3), np.float32)),
        "mtp.fc.biases is [64, 1], [64, 4] expected": ("mtp.fc.biases", np.zeros((64, 1), np.float32)),
    }
    for number, (said, (name, value)) in enumerate(damage.items()):
        tensors = {key: array for key, array in packed.items() if key != name}
        source = dense.split(tmp_path / str(number), tensors | ({} if value is None else {name: value}))
        checkpoint = open_checkpoint(source)
        with pytest.raises(ConversionError) as error:
            plan_heads(checkpoint, find_heads(checkpoint))
        assert said.replace("mtp.", "") in str(error.value) and str(source) in str(error.value)


def test_quantised_on_the_way_out(experts: Forms, tmp_path: Path) -> None:
    """As a user asks for it; routers, and matrices whose width is no multiple of 64, stay."""
    source = experts.split(tmp_path / "split", plain(experts.heads))
    _, meant = quantised(experts.heads, {"": 4}, group_size=64)
    meant = {name: value for name, value in meant.items() if not name.endswith("gate.weight")}
    folder = convert_heads(source, tmp_path / "heads", "--quantize-heads", "4")
    parity = check(experts.parity(folder, meant))
    head = parity.heads.heads[0]
    assert (
        head.fuse.bits == 4
        and type(head.block.mlp.gate) is type(head.block.mlp.shared_expert_gate) is nn.Linear
    )
    assert type(head.block.mlp.switch_mlp.down_proj) is not type(head.block.mlp.switch_mlp.up_proj)
    sizes = tensor_sizes(mx.load(str(folder / "mtp.safetensors")))
    assert sizes["heads.0.fuse.weight"] == WIDTH * 2 * WIDTH
    whole = convert(
        write_pytorch(experts.made, tmp_path / "model"), tmp_path / "whole", "--quantize-heads", "8"
    )
    assert experts.parity(whole / "mtp").heads.heads[0].fuse.bits == 8
    packed, _ = quantised(stacked(plain(experts.heads)), {"": 4}, **AFFINE)
    again = ["convert", str(experts.split(tmp_path / "packed", packed)), str(tmp_path / "twice")]
    again += ["--heads-only", "--quantize-heads", "4"]
    result = CliRunner().invoke(main, again)
    assert result.exit_code == 2 and "quantised already: leave --quantize-heads out" in result.stderr
    assert not (tmp_path / "twice").exists()


def test_glm_flash_split_from_the_model(tmp_path: Path) -> None:
    """mlx-vlm's names and the layer's own form: the tensors are those of the original, converted as a whole."""
    made = parity_checkpoint("glm-4.7-flash", {})
    whole = convert(write_pytorch(made, tmp_path / "model"), tmp_path / "whole") / "mtp"
    converted = {name: np.array(value) for name, value in mx.load(str(whole / "mtp.safetensors")).items()}
    names = {
        "fuse": "eh_proj",
        "norm_embedding": "enorm",
        "norm_hidden": "hnorm",
        "norm_out": "shared_head_norm",
    }
    flat = {"model.embed_tokens.weight": made.stored["model.embed_tokens.weight"]}
    flat["lm_head.weight"] = made.stored["lm_head.weight"]
    for name, value in converted.items():
        part, _, rest = name.removeprefix("heads.0.").partition(".")
        flat[f"model.mtp_block.{rest}" if part == "block" else f"model.{names[part]}.{rest}"] = value
    (tmp_path / "split").mkdir()
    save(tmp_path / "split" / "model.safetensors", flat)
    config = {"model_type": "glm4_moe_lite_mtp", "text_config": made.config, "block_size": 2}
    (tmp_path / "split" / "config.json").write_text(json.dumps(config))
    folder = convert_heads(tmp_path / "split", tmp_path / "heads")
    found = {name: np.array(value) for name, value in mx.load(str(folder / "mtp.safetensors")).items()}
    own = {"heads.0.embed_tokens.weight", "heads.0.lm_head.weight"}  # no trunk is there to share them with
    assert found.keys() == converted.keys() | own
    assert all((found[name] == converted[name]).all() for name in converted)


@pytest.mark.parametrize("stored", ["as they are", "4 bits"])
@pytest.mark.parametrize("base", ["as it is", "8 bits"])
def test_copies_are_told_by_the_model_at_hand(stored: str, base: str) -> None:
    """An embedding and an LM head that a repository of heads brings along, one of them another model's."""
    model = tiny_model("llama", hidden_size=64, intermediate_size=96)
    rows = {
        "model.embed_tokens.weight": np.array(model.model.embed_tokens.weight),
        "lm_head.weight": np.random.default_rng(0).normal(size=model.lm_head.weight.shape).astype(np.float32),
    }
    if stored == "4 bits":
        rows, _ = quantised(rows, {"": 4}, **AFFINE)
    if base == "8 bits":
        nn.quantize(model, 32, 8)
    types = {"uint32": "U32", "float32": "F32"}
    tensors = {n: LazyTensor(types[v.dtype.name], v.shape, partial(np.asarray, v)) for n, v in rows.items()}
    copies = [("heads.0.embed_tokens.weight", "model.embed_tokens.weight", "embed_tokens")]
    copies.append(("heads.0.lm_head.weight", "lm_head.weight", "lm_head"))
    found = Found("", HeadConvention(""), [], [], set(rows), {}, copies)
    left, owned = without_copies(Checkpoint(Path("x"), "", tensors), found, model)
    assert set(left.tensors) == owned.owned == {n for n in rows if n.startswith("lm_head.")}
