"""Proves that a model in several files is joined, or named as what it is where parts are missing or foreign."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import gguf
import mlx.core as mx
import numpy as np
import pytest

from mtp_mlx.convert.gguf.model import convert_gguf
from mtp_mlx.convert.gguf.parts import read_gguf
from mtp_mlx.convert.read.checkpoint import open_checkpoint
from mtp_mlx.errors import ConversionError
from tests.cli.convert_runs import refused, run
from tests.convert.gguf.gguf_files import finish, write_model

PART = "m-0000{}-of-00003.gguf"


@pytest.fixture
def first(tmp_path: Path) -> Path:
    """The first of three parts of a model."""
    path = write_model(tmp_path / "m.gguf", kind="Q8_0", tied=False, split_max_tensors=8).path
    assert path.name == PART.format(1) and len(list(tmp_path.iterdir())) == 3
    return path


def test_parts_are_joined(tmp_path: Path, first: Path) -> None:
    """The folder is the one that the model makes in one file."""
    (tmp_path / "whole").mkdir()
    whole = write_model(tmp_path / "whole" / "m.gguf", kind="Q8_0", tied=False).path
    joined, alone = convert_gguf(first, tmp_path / "a"), convert_gguf(whole, tmp_path / "b")
    for name in ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"):
        assert (joined / name).read_bytes() == (alone / name).read_bytes()
    found, expected = (mx.load(str(folder / "model.safetensors")) for folder in (joined, alone))
    assert found.keys() == expected.keys() and len(found) > 16
    assert all(np.array_equal(found[name], expected[name]) for name in found)


def test_info_and_the_plan_see_all_parts(tmp_path: Path, first: Path) -> None:
    facts = json.loads(run("info", first, "--json").stdout)
    size = sum(path.stat().st_size for path in tmp_path.iterdir())
    assert (facts["tensors"], facts["files"], facts["size"]) == (21, 3, size)
    assert "21 tensors, in 3 files" in run("convert", first, "--dry-run").stdout


def test_rope_factors_in_a_later_part_are_found(tmp_path: Path) -> None:
    ones = np.ones(8, np.float32)
    first = write_model(tmp_path / "m.gguf", extra={"rope_freqs.weight": ones}, split_max_tensors=8).path
    assert "rope_freqs.weight" not in [tensor.name for tensor in gguf.GGUFReader(first).tensors]
    config = json.loads((convert_gguf(first, tmp_path / "out") / "config.json").read_text())
    assert config["rope_scaling"]["factor"] == 1.0


def refuse(path: Path, message: str) -> None:
    """Converting, planning and showing `path` end in this sentence, and change nothing."""
    home = path.parent
    before = sorted(home.iterdir())
    for args in (("convert", path, home / "out"), ("convert", path, "--dry-run"), ("info", path)):
        assert message in refused(*args), args
    assert sorted(home.iterdir()) == before


def test_a_later_part_names_the_first(first: Path) -> None:
    refuse(
        first.with_name(PART.format(2)),
        f"this is part 2 of 3 of a model that was split into several files: give the first part, {PART.format(1)}.",
    )


def test_missing_parts_are_named(first: Path) -> None:
    first.with_name(PART.format(3)).unlink()
    split = "this is part 1 of 3 of a model that was split into several files"
    refuse(first, f"{split}, 1 of which is missing beside it: {PART.format(3)}. Get all parts.")
    first.with_name(PART.format(2)).unlink()
    refuse(first, f"2 of which are missing beside it: {PART.format(2)}, {PART.format(3)}")


def test_another_name_hides_the_others(first: Path) -> None:
    refuse(first.rename(first.with_name("model.gguf")), "its name does not end in -00001-of-00003.gguf")


def test_parts_of_other_models_are_refused(tmp_path: Path, first: Path) -> None:
    third = first.with_name(PART.format(3))
    kept = third.read_bytes()
    shutil.copy(first.with_name(PART.format(2)), third)
    refuse(first, f"{PART.format(3)}: its name says part 3 of 3, its metadata say part 2 of 3")
    third.write_bytes(write_model(tmp_path / "other.gguf").path.read_bytes())
    (tmp_path / "other.gguf").unlink()
    refuse(first, "its metadata say part 1 of 1")
    third.write_bytes(kept[:-100])
    refuse(first, f"{PART.format(3)}: the file is truncated")


def part(path: Path, number: int, names: list[str], total: int = 2) -> None:
    """A part of two that holds small tensors of these names."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_uint16("split.no", number)
    writer.add_uint16("split.count", 2)
    writer.add_int32("split.tensors.count", total)
    for name in names:
        writer.add_tensor(name, np.ones(4, np.float32))
    finish(writer)


def test_tensors_must_be_there_once_and_all_of_them(tmp_path: Path) -> None:
    first, second = (tmp_path / f"m-0000{n}-of-00002.gguf" for n in (1, 2))
    part(first, 0, ["a", "b"])
    part(second, 1, ["b"])
    refuse(first, f"{second}: the tensor 'b' is in another part too")
    part(second, 1, ["c", "d"])
    refuse(first, "its 2 parts hold 4 tensors, the metadata say 2")
    part(second, 1, [])
    assert read_gguf(first).tensors.keys() == {"a", "b"}


def test_a_part_that_cannot_be(tmp_path: Path) -> None:
    part(tmp_path / "m.gguf", 5, ["a"])
    refuse(tmp_path / "m.gguf", "part split.no = 5, counted from 0, of split.count = 2 parts")


@pytest.mark.parametrize("name", ["m.Q6_K.gguf.part1of2", "m.Q6_K.gguf-split-a"])
def test_pieces_cut_by_size_are_named(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(write_model(tmp_path / "m.gguf").path.read_bytes()[:5000])
    with pytest.raises(ConversionError, match="piece of a .gguf file that was cut by size: join the pieces"):
        open_checkpoint(tmp_path / name)
