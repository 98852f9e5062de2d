"""`mtp-mlx convert` on hostile and damaged checkpoints of every container: one sentence, exit code 2, nothing left.

Every way through the command is taken: whole, quantised, heads alone, in the speculators layout, the plan, and what
stands in OUT already.
"""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.cli import damage
from tests.cli.convert_runs import refused, run
from tests.convert.adapters.test_peft import SLOTS, factors
from tests.convert.checkpoints import write_safetensors, write_shards
from tests.convert.read.hostile_pickles import hostile
from tests.convert.read.torch_files import Tensor, write_torch, write_zip
from tests.convert.whole_checkpoints import Whole, whole, with_tokenizer
from tests.tiny import save_tiny

Arrays = dict[str, np.ndarray]
WAYS: dict[str, tuple[str, ...]] = {
    "whole": (),
    "quantised": ("--quantize", "4"),
    "trunk only": ("--trunk-only",),
    "heads only": ("--heads-only",),
    "speculators": ("--heads-only", "--heads-as", "speculators"),
    "measured": ("--verify",),
}
HEADS, TRUNK = "model.mtp_layers.0.input_proj.weight", "model.layers.1.mlp.up_proj.weight"


def below(folder: Path) -> list[str]:
    """Names of everything in a folder."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def refused_every_way(source: Path, expected: str, ways: Any = WAYS) -> None:
    """Every way ends in the same sentence, and neither makes nor changes a thing."""
    home = source.parent if source.parent.name != "model" else source.parent.parent
    kept = home / "kept"
    kept.mkdir()
    for name in ("config.json", "mtp_config.json"):
        (kept / name).write_text("{}")
    before = below(home)
    for way in ways:
        for out, force in ((home / "new" / "deep" / "out", ()), (kept, ("--force",))):
            assert expected in refused("convert", source, out, *WAYS[way], *force), way
            assert below(home) == before, way
    assert (kept / "config.json").read_text() == "{}"


# --- pickles ------------------------------------------------------------------------------------------------

FILES: dict[str, str] = {
    "pytorch_model.bin": "config.json",
    "medusa_lm_head.pt": "config.json",
    "consolidated.00.pth": "params.json",
    "last.ckpt": "config.json",
    "adapter_model.bin": "adapter_config.json",
}


@pytest.mark.parametrize("file", list(FILES))
def test_no_hostile_pickle_runs(tmp_path: Path, file: str) -> None:
    """Every way of hiding a call, in every file that PyTorch programs write."""
    source, marker = tmp_path / "model", tmp_path / "ran"
    with_tokenizer(source)
    (source / FILES[file]).write_text(json.dumps({"model_type": "llama", "hidden_size": 8}))
    for case, (pickle_bytes, name) in hostile(f"touch {marker}").items():
        write_zip(source / file, pickle_bytes, {})
        before = below(tmp_path)
        for target in (source, source / file):
            for options in [*WAYS.values(), ("--dry-run",)]:
                message = refused("convert", target, tmp_path / "out", *options)
                assert f"its pickle names {name}, which is not a tensor record" in message, case
            assert f"names {name}" in run("info", target).output  # which says so of the heads, and goes on
        assert below(tmp_path) == before, case


@pytest.mark.parametrize("case", ["os.system", "in a state_dict", "reduce, protocol 4", "newobj"])
def test_a_hostile_shard_among_good_ones(tmp_path: Path, case: str) -> None:
    made = whole("mimo-7b")
    source = shards(tmp_path / "model", made.made.stored, made)
    pickle_bytes, name = hostile(f"touch {tmp_path / 'ran'}")[case]
    write_zip(source / "b.bin", pickle_bytes, {})
    refused_every_way(source, f"b.bin: its pickle names {name}, which is not a tensor record")


def shards(folder: Path, stored: Arrays, made: Whole) -> Path:
    """A checkpoint as two PyTorch files with their index."""
    made.write(folder)
    (folder / "model.safetensors").unlink()
    names = sorted(stored)
    files = {"a.bin": names[::2], "b.bin": names[1::2]}
    for file, held in files.items():
        write_torch(folder / file, OrderedDict((name, stored[name]) for name in held))
    index = {"metadata": {}, "weight_map": {name: file for file, held in files.items() for name in held}}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    return folder


# --- PyTorch files that are damaged -------------------------------------------------------------------------


def truncate(source: Path) -> None:
    """The second file without its end."""
    path = source / "b.bin"
    path.write_bytes(path.read_bytes()[:-1000])


def lose_a_file(source: Path) -> None:
    """The index names a file that is not there."""
    (source / "b.bin").unlink()


def lose_a_tensor(source: Path) -> None:
    """The index names a tensor that no file holds."""
    path = source / "pytorch_model.bin.index.json"
    index = json.loads(path.read_text())
    index["weight_map"]["model.ghost.weight"] = "a.bin"
    path.write_text(json.dumps(index))


def leave_the_folder(source: Path) -> None:
    """The index names a file of another folder."""
    path = source / "pytorch_model.bin.index.json"
    path.write_text(path.read_text().replace("b.bin", "../b.bin"))


def compress(source: Path) -> None:
    """A storage that is too short for its tensor."""
    write_torch(source / "b.bin", {"w": Tensor(np.zeros(4, np.float32), shape=(400, 400))})


BROKEN: dict[str, tuple[Callable[[Path], None], str]] = {
    "truncated": (truncate, "b.bin: the file is truncated or damaged"),
    "a missing file": (lose_a_file, "1 of which are missing: b.bin"),
    "a missing tensor": (lose_a_tensor, "that its files do not hold: model.ghost.weight"),
    "another folder": (leave_the_folder, "names files outside its own folder (../b.bin)"),
    "a short storage": (compress, "b.bin: a tensor of shape [400, 400] needs"),
}


@pytest.mark.parametrize("how", list(BROKEN))
def test_broken_files(tmp_path: Path, how: str) -> None:
    made, (damage, expected) = whole("mimo-7b"), BROKEN[how]
    source = shards(tmp_path / "model", made.made.stored, made)
    damage(source)
    refused_every_way(source, expected)
    assert expected in refused("convert", source, "--dry-run")


MISFITS: dict[str, tuple[Callable[[np.ndarray], np.ndarray], str]] = {
    "a whole-number type": (lambda w: w.astype(np.int64), "is of type {}, a float type expected"),
    "a shape": (lambda w: w[:-1], "is [{1}, {2}], [{0}, {2}] expected"),
    "a transposed shape": (lambda w: w.T, "is [{2}, {0}], [{0}, {2}] expected"),
    "a dimension too many": (lambda w: w[None], "is [1, {0}, {2}], [{0}, {2}] expected"),
}


@pytest.mark.parametrize("container", ["safetensors", "pytorch"])
@pytest.mark.parametrize("key", [HEADS, TRUNK], ids=["heads", "trunk"])
@pytest.mark.parametrize("how", list(MISFITS))
def test_misfits(tmp_path: Path, how: str, key: str, container: str) -> None:
    """A tensor of a wrong type or shape, in the trunk or in a head, in either container."""
    made, (change, message) = whole("mimo-7b"), MISFITS[how]
    rows, columns = made.made.stored[key].shape
    made.made.stored[key] = change(made.made.stored[key])
    source = tmp_path / "model"
    if container == "pytorch":
        shards(source, made.made.stored, made)
    else:
        made.write(source)
    dtype = "I64" if key == HEADS else "int64"
    expected = f"{key} " + (
        message.format(dtype) if "type" in how else message.format(rows, rows - 1, columns)
    )
    alone = ("heads only", "speculators")
    ways = [
        way for way in WAYS if (way in alone) <= (key == HEADS) and (way == "trunk only") <= (key == TRUNK)
    ]
    refused_every_way(source, expected, ways)
    if key == HEADS:
        assert expected in refused("convert", source, "--dry-run")


def test_a_base_that_does_not_fit(tmp_path: Path) -> None:
    """A PEFT adapter whose factors fit no layer of the base that is named."""
    base = whole("mimo-7b")
    assert run("convert", base.write(tmp_path / "model"), tmp_path / "base", "--trunk-only").exit_code == 0
    lora = tmp_path / "lora"
    lora.mkdir()
    write_torch(lora / "adapter_model.bin", factors() | SLOTS)
    (lora / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 4, "lora_alpha": 8}))
    before = below(tmp_path)
    options = ("--heads-only", "--base", tmp_path / "base")
    assert "low_rank.layers" in refused("convert", lora, tmp_path / "deep" / "out", *options)
    assert below(tmp_path) == before


def test_a_full_disk_leaves_no_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While the trunk of a PyTorch file is laid out for mlx-lm, and while the heads are written."""
    made = whole("mimo-7b")
    source = shards(tmp_path / "model", made.made.stored, made)
    before = below(tmp_path)

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    for where in ("mtp_mlx.convert.trunk.save_targets", "mtp_mlx.convert.heads.write.save_targets"):
        with monkeypatch.context() as patch:
            patch.setattr(where, full)
            assert "disk is full" in refused("convert", source, tmp_path / "new" / "deep" / "out")
        assert below(tmp_path) == before
    monkeypatch.setattr("mtp_mlx.convert.heads.write.save_targets", full)
    assert "disk is full" in refused("convert", source, tmp_path / "new" / "out", "--heads-only")
    assert below(tmp_path) == before


def test_undamaged_it_is_converted(tmp_path: Path) -> None:
    """What these tests damage is a good checkpoint before."""
    made = whole("mimo-7b")
    source = shards(tmp_path / "model", made.made.stored, made)
    for way in ("whole", "trunk only", "heads only", "speculators"):
        result = run("convert", source, tmp_path / "new" / way, *WAYS[way])
        assert result.exit_code == 0, result.output


# --- sharded safetensors, and code beside the weights -------------------------------------------------------


@pytest.mark.parametrize("where", ["file", "folder", "shard"])
@pytest.mark.parametrize(
    "case", ["os.system", "in a state_dict", "reduce, protocol 4", "stack global through memo"]
)
def test_a_hostile_pickle_runs_nothing(tmp_path: Path, case: str, where: str) -> None:
    marker, source = tmp_path / "ran", tmp_path / "model"
    pickle_bytes, name = hostile(f"touch {marker}")[case]
    source.mkdir()
    path = write_zip(source / "pytorch_model.bin", pickle_bytes, {})
    if where == "shard":
        index = {"weight_map": {"w": "pytorch_model.bin"}}
        (source / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    target = path if where == "file" else source
    for args in (
        ("convert", target, tmp_path / "out", "--heads-only"),
        ("convert", target, tmp_path / "out"),
        ("convert", target, "--dry-run"),
        ("info", target),
    ):
        message = refused(*args)
        assert f"its pickle names {name}, which is not a tensor record" in message
    assert [path.name for path in tmp_path.iterdir()] == ["model"]  # no marker, no output, nothing temporary


GLM_HEADS, GLM_TRUNK = "model.layers.4.eh_proj.weight", "model.layers.1.mlp.gate.weight"


def damaged(folder: Path, kind: str, key: str) -> str:
    """A sharded checkpoint damaged in one way; returns what the message must say."""
    made = whole("glm-4.5")
    made.write(folder)
    stored = made.made.stored
    names = sorted(stored)
    halves = [{name: stored[name] for name in part} for part in (names[::2], names[1::2])]
    (folder / "model.safetensors").unlink()
    home = next(half for half in halves if key in half)
    shape = list(home[key].shape)
    if kind == "wrong type":
        home[key] = home[key].astype(np.int32)
    if kind == "wrong shape":
        home[key] = home[key][:, :-1]
    write_shards(folder, {"a.safetensors": halves[0], "b.safetensors": halves[1]})
    if kind == "truncated shard":
        raw = (folder / "b.safetensors").read_bytes()
        (folder / "b.safetensors").write_bytes(raw[:-100])
    if kind == "missing shard":
        (folder / "b.safetensors").unlink()
    return {
        "wrong type": f"{key} is of type {'I32' if key == GLM_HEADS else 'int32'}, a float type expected",
        "wrong shape": f"{key} is {[shape[0], shape[1] - 1]}, {shape} expected",
        "truncated shard": "b.safetensors: the file is truncated",
        "missing shard": "1 of which are missing: b.safetensors",
    }[kind]


@pytest.mark.parametrize("key", [GLM_HEADS, GLM_TRUNK], ids=["heads", "trunk"])
@pytest.mark.parametrize("kind", ["wrong type", "wrong shape", "truncated shard", "missing shard"])
def test_a_damaged_checkpoint_is_one_sentence(tmp_path: Path, kind: str, key: str) -> None:
    expected = damaged(tmp_path / "model", kind, key)
    assert expected in refused("convert", tmp_path / "model", tmp_path / "out")
    assert expected in refused("convert", tmp_path / "model", tmp_path / "out", "--quantize", "4")
    if key == GLM_HEADS:
        assert expected in refused("convert", tmp_path / "model", tmp_path / "out", "--heads-only")
        assert expected in refused("convert", tmp_path / "model", "--dry-run")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_code_beside_the_weights_is_not_run(tmp_path: Path) -> None:
    """A folder whose configuration asks for code of its own, for the model and for the tokenizer."""
    source = whole("mimo-7b").write(tmp_path / "model", model_file="own.py")
    marker = tmp_path / "ran"
    (source / "own.py").write_text(f"open({str(marker)!r}, 'w')\n")
    assert "requires importing and running a custom module" in refused("convert", source, tmp_path / "out")
    whole("mimo-7b").write(source)
    config = json.loads((source / "tokenizer_config.json").read_text())
    config |= {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": [None, "own.Own"]}}
    (source / "tokenizer_config.json").write_text(json.dumps(config))
    assert "contains custom code" in refused("convert", source, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["model"] and not marker.exists()


@pytest.mark.parametrize(
    ("edit", "expected"),
    [
        (damage.config(quantization_config=damage.AWQ), "mlx-lm cannot load the trunk"),
        (damage.config(vocab_size=-1), "mlx-lm cannot load the trunk"),
        (damage.lacks("tokenizer.json", "tokenizer_config.json"), "it has no tokenizer: copy tokenizer.json"),
    ],
    ids=["AWQ that is none", "vocabulary below 0", "no tokenizer"],
)
def test_damage_that_mlx_lm_notices_late_or_never(tmp_path: Path, edit: damage.Edit, expected: str) -> None:
    source = save_tiny(tmp_path / "model", "qwen3")
    edit(source)
    for way in ("whole", "quantised"):
        assert expected in refused("convert", source, tmp_path / "new" / "out", *WAYS[way])
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_type_that_no_one_knows(tmp_path: Path) -> None:
    write_safetensors(tmp_path / "m.safetensors", {"w": np.ones(8, np.uint8)}, {"w": "F4"})
    assert "tensor 'w' has the type F4" in refused("convert", tmp_path / "m.safetensors", "--dry-run")
