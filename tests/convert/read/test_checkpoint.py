"""Proves that one mapping of tensors comes out of every container, and what is no checkpoint is refused."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from mtp_mlx.convert.read.checkpoint import open_checkpoint
from mtp_mlx.errors import ConversionError
from tests.convert.checkpoints import write_safetensors
from tests.convert.read.torch_files import write_torch

A = np.arange(6, dtype=np.float32).reshape(2, 3)
B = A + 10


def test_every_container_gives_the_same_mapping(tmp_path: Path) -> None:
    folders = {name: tmp_path / name for name in ("single", "bin", "shards", "pth", "mixed")}
    for folder in folders.values():
        folder.mkdir()
        (folder / "config.json").write_text('{"model_type": "llama"}')
    write_safetensors(folders["single"] / "model.safetensors", {"a": A, "b": B})
    write_torch(folders["bin"] / "pytorch_model.bin", {"a": A, "b": B})
    write_torch(folders["bin"] / "training_args.bin", {"lr": np.ones(1)})
    write_torch(folders["bin"] / "rng_state_0.pth", {"cpu": np.ones(1)})
    write_torch(folders["shards"] / "pytorch_model-1.bin", {"a": A})
    write_torch(folders["shards"] / "pytorch_model-2.bin", {"b": B})
    weight_map = {"a": "pytorch_model-1.bin", "b": "pytorch_model-2.bin"}
    (folders["shards"] / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    write_torch(folders["pth"] / "consolidated.pth", {"a": A, "b": B})
    # The same weights three times over: safetensors win, Meta's own copy is left alone.
    write_safetensors(folders["mixed"] / "model.safetensors", {"a": A, "b": B})
    write_safetensors(folders["mixed"] / "consolidated.safetensors", {"tok": A})
    write_torch(folders["mixed"] / "pytorch_model.bin", {"a": B})
    for name, folder in folders.items():
        found = open_checkpoint(folder)
        assert found.container == ("safetensors" if name in ("single", "mixed") else "pytorch")
        assert found.tensors.keys() == {"a", "b"} and found.config == {"model_type": "llama"}
        np.testing.assert_array_equal(found.tensors["a"].float32(), A)
        np.testing.assert_array_equal(found.tensors["b"].float32(), B)


def test_one_file(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama", "text_config": {"hidden_size": 3}}')
    write_torch(tmp_path / "last.ckpt", {"state_dict": {"a": A}, "hyper_parameters": {"lr": 0.5}})
    found = open_checkpoint(tmp_path / "last.ckpt")
    assert found.values == {"hyper_parameters": {"lr": 0.5}} and found.files == ["last.ckpt"]
    assert found.text_config["hidden_size"] == 3


def test_metas_and_pefts_configurations(tmp_path: Path) -> None:
    write_torch(tmp_path / "consolidated.pth", {"a": A})
    (tmp_path / "params.json").write_text('{"dim": 3}')
    assert (open_checkpoint(tmp_path).config, open_checkpoint(tmp_path).config_name) == (
        {"dim": 3},
        "params.json",
    )


def test_what_is_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(ConversionError, match=r"no \.safetensors, \.bin, .* file"):
        open_checkpoint(tmp_path)
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(
        ConversionError, match=r"only checkpoint folders and files ending in \.gguf.* can be converted"
    ):
        open_checkpoint(tmp_path / "notes.txt")
    with pytest.raises(FileNotFoundError):
        open_checkpoint(tmp_path / "none.safetensors")
    with pytest.raises(FileNotFoundError):
        open_checkpoint(tmp_path / "none")
    write_safetensors(tmp_path / "model.safetensors", {})
    with pytest.raises(ConversionError, match="there are no tensors in it"):
        open_checkpoint(tmp_path)
    for text in ("{", '{"a":' * 100_000):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(ConversionError, match="is not JSON"):
            open_checkpoint(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(ConversionError, match="is not a model's configuration"):
        open_checkpoint(tmp_path)
