"""Proves that an adapter folder comes back as it was written, only for its own base, and never by halves."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_map

from mtp_mlx.adapter_folder import Header, read_header
from mtp_mlx.drafters.masks.folder import config_of as mask_config
from mtp_mlx.drafters.masks.folder import mask_header
from mtp_mlx.drafters.masks.folder import save as save_adapter
from mtp_mlx.drafters.masks.weights import MaskAdapter
from mtp_mlx.drafters.registry import load_folder
from mtp_mlx.errors import MTPError
from mtp_mlx.model.attach import attach
from mtp_mlx.model.block import Block, block_shape
from mtp_mlx.model.fingerprint import base_fingerprint
from tests.model.naive import QUANTIZABLE, random_adapter
from tests.tiny import ARCHITECTURES, tiny_model

IDS = mx.array([3, 9, 64, 100], dtype=mx.int32)


def written(folder: Path, model: nn.Module, ids: mx.array | None = IDS) -> tuple[MaskAdapter, Header]:
    """An adapter of `model` saved in `folder`."""
    adapter = random_adapter(model, draft_ids=ids, draft_vocab_size=0 if ids is None else len(ids))
    info = mask_header(
        adapter.config,
        "tiny",
        base_fingerprint(model),
        training={"objective": "self-distill", "steps": 7},
        acceptance=[0.75, 0.5],
        measurements={"tokens per step": {"qa": 1.5}},
    )
    save_adapter(folder, adapter, info)
    return adapter, info


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_round_trip(tmp_path: Path, architecture: str) -> None:
    model = tiny_model(architecture, seed=3)
    adapter, info = written(tmp_path / "adapter", model)
    found, found_info = load_folder(tmp_path / "adapter", model)
    assert found_info == info and found.config == adapter.config
    own, theirs = adapter.tensors(), found.tensors()
    assert own.keys() == theirs.keys()
    for name, value in own.items():
        expected = value if name == "draft_ids" else value.astype(mx.bfloat16).astype(mx.float32)
        assert mx.array_equal(theirs[name], expected) and theirs[name].dtype == expected.dtype, name
    block = Block.decode(mx.array([5]), block_shape(0, (2,)), 0, 157)
    attached = attach(model, found)
    hidden = attached.forward(block, attached.make_cache())
    attached.detach()
    rounded = random_adapter(model, draft_ids=IDS)
    rounded.load_tensors(
        {name: value.astype(mx.bfloat16) for name, value in own.items() if name != "draft_ids"}
    )
    again = attach(model, rounded)
    assert mx.array_equal(hidden, again.forward(block, again.make_cache()))


def test_weights_are_stored_in_bfloat16(tmp_path: Path) -> None:
    model = tiny_model("llama")
    adapter, info = written(tmp_path / "small", model, ids=None)
    stored = mx.load(str(tmp_path / "small" / "mtp.safetensors"))
    assert {value.dtype for value in stored.values()} == {mx.bfloat16} and "draft_ids" not in stored
    save_adapter(tmp_path / "exact", adapter, info, dtype=mx.float32)
    exact, _ = load_folder(tmp_path / "exact", model)
    assert all(mx.array_equal(value, adapter.tensors()[name]) for name, value in exact.tensors().items())
    written(tmp_path / "draft", model)
    assert mx.load(str(tmp_path / "draft" / "mtp.safetensors"))["draft_ids"].dtype == mx.int32


def test_the_card_says_what_it_is(tmp_path: Path) -> None:
    written(tmp_path / "adapter", tiny_model("llama"))
    card = (tmp_path / "adapter" / "README.md").read_text()
    for text in (
        "# Mask-token adapter for tiny",
        "0.75 / 0.50",
        "slots 4, rank 3",
        "draft vocabulary: 4",
        '"qa": 1.5',
    ):
        assert text in card


# --- fingerprints -------------------------------------------------------------------------------------------


def cast(model: nn.Module, dtype: mx.Dtype) -> nn.Module:
    model.update(tree_map(lambda value: value.astype(dtype), model.parameters()))
    return model


@pytest.mark.parametrize("architecture", ["llama", "qwen3", "gemma2", "olmo2", "olmoe"])
def test_one_base_in_any_precision_has_one_fingerprint(architecture: str) -> None:
    def build(seed: int = 3, **overrides: Any) -> nn.Module:
        return tiny_model(architecture, seed=seed, **{**QUANTIZABLE, **overrides})

    own = base_fingerprint(build())
    assert len(own) == 16 and int(own, 16)
    assert base_fingerprint(cast(build(), mx.bfloat16)) == own
    for bits in (4, 8):
        for dtype in (mx.float32, mx.bfloat16):
            quantized = cast(build(), dtype)
            nn.quantize(quantized, group_size=32, bits=bits)
            assert base_fingerprint(quantized) == own
    attached = attach(model := build(), random_adapter(build()))
    assert base_fingerprint(model) == own
    attached.detach()
    assert base_fingerprint(build(seed=4)) != own
    assert base_fingerprint(build(num_hidden_layers=3)) != own
    assert base_fingerprint(build(vocab_size=158)) != own
    tuned = build()
    norm = tuned.model.layers[1].post_attention_layernorm
    norm.weight = norm.weight * mx.where(mx.arange(norm.weight.size) == 5, 1.05, 1.0)
    assert base_fingerprint(tuned) != own


def test_another_base_is_refused_with_both_fingerprints(tmp_path: Path) -> None:
    model, other = tiny_model("llama", seed=3), tiny_model("llama", seed=4)
    written(tmp_path / "adapter", model)
    with pytest.raises(MTPError) as error:
        load_folder(tmp_path / "adapter", other)
    for text in (base_fingerprint(model), base_fingerprint(other), "'tiny'", "use it with its own base"):
        assert text in str(error.value)


# --- damage -------------------------------------------------------------------------------------------------


def change_config(folder: Path, **changes: Any) -> None:
    path = folder / "mtp_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


DAMAGE = {
    "no config": (lambda f: (f / "mtp_config.json").unlink(), "is not an adapter folder: it has no mtp_config.json"),
    "cut config": (lambda f: (f / "mtp_config.json").write_text('{"format"'), "mtp_config.json cannot be read"),
    "format": (lambda f: change_config(f, format=2), "has format 2, and this version of mtp-mlx reads format 1"),
    "method": (lambda f: change_config(f, method="heads"), "method 'heads', which .* knows 'mask-tokens'"),
    "no base": (lambda f: change_config(f, base={}), "mtp_config.json is damaged: it has no 'name'"),
    "shape": (lambda f: change_config(f, adapter={"slots": 4, "depth": 2}), "is damaged: .*'depth'"),
    "rank": (lambda f: change_config(f, adapter={"slots": 4, "rank": 0}), "`rank` must be at least 1; got 0"),
    "no weights": (lambda f: (f / "mtp.safetensors").unlink(), "mtp.safetensors is missing or damaged"),
    "no header": (lambda f: (f / "mtp.safetensors").write_bytes(b"x"), "mtp.safetensors is missing or damaged"),
    "cut weights": (
        lambda f: (f / "mtp.safetensors").write_bytes((f / "mtp.safetensors").read_bytes()[:-100]),
        "mtp.safetensors is missing or damaged",
    ),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_one_sentence(tmp_path: Path, damage: str) -> None:
    model = tiny_model("llama")
    written(tmp_path / "adapter", model)
    harm, message = DAMAGE[damage]
    harm(tmp_path / "adapter")
    with pytest.raises(MTPError, match=message) as error:
        load_folder(tmp_path / "adapter", model)
    assert len(str(error.value).splitlines()) == 1


def test_tensors_that_do_not_fit_are_all_named(tmp_path: Path) -> None:
    model = tiny_model("llama")
    adapter, info = written(tmp_path / "adapter", model)
    path = tmp_path / "adapter" / "mtp.safetensors"
    tensors = dict(mx.load(str(path)))
    del tensors["slot_embeddings.weight"]
    tensors["extra"] = mx.zeros((2,))
    tensors["sampler.norm.bias"] = mx.zeros((3,))
    mx.eval(tensors)
    mx.save_safetensors(str(path), tensors)
    message = (
        r"missing slot_embeddings.weight \(4, 48\); unexpected extra \(2,\); sampler.norm.bias is \(3,\)"
    )
    with pytest.raises(MTPError, match=message):
        load_folder(tmp_path / "adapter", model)


@pytest.mark.parametrize("existing", [False, True])
def test_nothing_half_written(tmp_path: Path, existing: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A failure in the last file leaves the folder that was there, or none, and nothing beside it."""
    model = tiny_model("llama")
    folder = tmp_path / "adapter"
    if existing:
        written(folder, model)
    before = {path.name: path.read_bytes() for path in folder.iterdir()} if existing else None

    def fail(*_: Any) -> str:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("mtp_mlx.adapter_folder.model_card", fail)
    with pytest.raises(MTPError, match="the disk is full: .*adapter could not be written"):
        written(folder, model, ids=None)
    assert [path.name for path in tmp_path.iterdir()] == (["adapter"] if existing else [])
    if existing:
        assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
        assert mask_config(folder, read_header(folder)).draft_vocab_size == 4


def test_an_older_adapter_is_replaced_whole(tmp_path: Path) -> None:
    model = tiny_model("llama")
    written(tmp_path / "adapter", model)
    (tmp_path / "adapter" / "stale.txt").write_text("x")
    adapter, _ = written(tmp_path / "adapter", model, ids=None)
    assert sorted(path.name for path in (tmp_path / "adapter").iterdir()) == [
        "README.md", "mtp.safetensors", "mtp_config.json"
    ]  # fmt: skip
    found, _ = load_folder(tmp_path / "adapter", model)
    assert found.draft_ids is None and np.array(found.slot_embeddings.weight).shape == (4, 48)
