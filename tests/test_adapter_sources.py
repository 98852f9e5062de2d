"""Proves that heads of others are fetched no more than needed, measured, kept, and refused if they are useless.

No network: `tests/stand_in_hub.py`. The model and its heads are `tests/table_qwen.py`.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from click.testing import CliRunner, Result

from mtp_mlx import generate, hub, load
from mtp_mlx.adapter_folder import read_header
from mtp_mlx.cli import main
from mtp_mlx.convert.heads import take
from mtp_mlx.drafters.heads.cascade import MTPHeads
from mtp_mlx.errors import MTPError
from tests.convert.checkpoints import write_safetensors, write_shards
from tests.stand_in_hub import StandIn
from tests.table_qwen import CONFIG, Arrays, half_converted, heads, split_folder, table_folder

PROMPT = [5, 12, 19]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return table_folder(tmp_path_factory.mktemp("table") / "model")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MTP_MLX_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(take, "TOKENS", 12)
    return tmp_path / "cache" / "heads"


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> StandIn:
    made = StandIn(tmp_path / "hub")
    monkeypatch.setattr(hub, "hub_api", lambda: made)
    return made


def original(folder: Path, tensors: Arrays, model: Path, shards: bool = True) -> Path:
    """The model as it was released: its heads among its tensors, in the last of three shards."""
    trunk = {name: np.array(v) for name, v in mx.load(str(model / "model.safetensors")).items()}
    names = sorted(trunk)
    last = {f"mtp.{name}": value for name, value in tensors.items()}
    folder.mkdir(parents=True)
    if shards:
        parts = {
            f"model-0000{i + 1}-of-00003.safetensors": {n: trunk[n] for n in names[i::2]} for i in (0, 1)
        }
        write_shards(folder, parts | {"model-00003-of-00003.safetensors": last})
    else:
        write_safetensors(folder / "model.safetensors", trunk | last)
    (folder / "config.json").write_text(json.dumps(CONFIG))
    return folder


def names(folder: Path) -> list[str]:
    """What is in a folder of the cache, without locks."""
    return (
        [path.name for path in folder.iterdir() if not path.name.startswith(".")] if folder.exists() else []
    )


@pytest.mark.parametrize(
    ("state", "plain", "gain"),
    [("post-norm", True, 1.0), ("post-norm", True, 0.3), ("pre-norm", True, 1.0), ("pre-norm", False, 1.7)],
    ids=["as the form says", "norms mistaken", "state mistaken", "both mistaken"],
)
def test_the_convention_is_found_and_kept(
    model: Path, cache: Path, tmp_path: Path, state: str, plain: bool, gain: float, monkeypatch: Any
) -> None:
    """A gain of 0.3 looks like a norm around zero, and one of 1.7 stored so like a plain one."""
    source = split_folder(tmp_path / "split", heads(state, plain=plain, gain=gain))
    attached, tokenizer = load(str(model), heads=source)
    assert isinstance(attached.speculator, MTPHeads)
    header = read_header(cache / names(cache)[0])
    convention = header.own["heads"]["convention"]
    assert (convention["first_hidden"], convention["zero_centred_norms"]) == (state, not plain)
    assert header.acceptance[0] == 1.0 and header.measurements["verify"]["acceptance"] == header.acceptance
    plainly = load(str(model), None)[0]
    expected = generate(plainly, tokenizer, PROMPT, max_tokens=20)
    assert generate(attached, tokenizer, PROMPT, max_tokens=20, layout="linear") == expected
    # Later loads take what is kept, and measure nothing.
    monkeypatch.setattr("mtp_mlx.convert.read.checkpoint.open_checkpoint", None)
    assert load(str(model), heads=str(source))[0].info == header and len(names(cache)) == 1


def test_the_order_of_a_quantised_weight_is_found(model: Path, tmp_path: Path) -> None:
    """Its columns are packed, and change places in groups."""
    tensors = heads(plain=True)
    tensors["fc.weight"] = np.hstack(np.split(tensors["fc.weight"], 2, axis=1)[::-1])
    parts = mx.quantize(mx.array(tensors["fc.weight"]), group_size=32, bits=8)
    tensors |= {f"fc.{name}": np.array(part) for name, part in zip(("weight", "scales", "biases"), parts)}
    attached, _ = load(str(model), heads=split_folder(tmp_path / "split", tensors))
    convention = attached.info.own["heads"]["convention"]
    assert convention["stored_order"] == "hidden" and attached.info.acceptance[0] == 1.0
    assert attached.speculator.heads[0].fuse.bits == 8


def test_half_converted_norms_are_found(model: Path, tmp_path: Path) -> None:
    attached, _ = load(str(model), heads=split_folder(tmp_path / "split", half_converted()))
    assert attached.info.own["heads"]["convention"]["mixed_norms"] and attached.info.acceptance[0] == 1.0


def test_a_file_without_a_config_is_the_models(model: Path, tmp_path: Path) -> None:
    tensors = {f"mtp.{name}": value for name, value in heads(plain=False).items()}
    file = write_safetensors(tmp_path / "any-name.safetensors", tensors)
    attached, _ = load(str(model), heads=file)
    assert attached.info.acceptance[0] == 1.0


def test_useless_heads_are_refused_with_what_was_tried(model: Path, cache: Path, tmp_path: Path) -> None:
    tensors = heads(plain=True)
    tensors["fc.weight"] = np.roll(tensors["fc.weight"], 3, axis=0)
    source = split_folder(tmp_path / "split", tensors)
    with pytest.raises(
        MTPError, match=r"not for this model, or damaged: the first draft is right in \d+%"
    ) as error:
        load(str(model), heads=source)
    assert str(error.value).count(" with ") == 12  # every convention
    assert names(cache) == []


def test_only_the_shards_with_heads_are_fetched(
    model: Path, stand_in: StandIn, caplog: pytest.LogCaptureFixture
) -> None:
    original(stand_in.remote / "maker" / "original", heads(plain=False), model)
    attached, _ = load(str(model), heads="maker/original")
    assert attached.info.acceptance[0] == 1.0
    last = "model-00003-of-00003.safetensors"
    assert sorted(stand_in.fetched) == ["config.json", last, "model.safetensors.index.json"]
    size = (stand_in.remote / "maker" / "original" / last).stat().st_size / 1e6
    assert f"fetching the MTP heads of maker/original: 1 file(s), {size:.1f} MB of " in caplog.text
    stand_in.fails = ConnectionError("no network")
    again, _ = load(str(model), heads="maker/original")
    assert again.info == attached.info


@pytest.mark.parametrize("file", ["mtp.safetensors", "mtp/weights.safetensors"])
def test_only_the_file_beside_the_index_is_fetched(model: Path, stand_in: StandIn, file: str) -> None:
    folder = stand_in.remote / "maker" / "pack"
    shutil.copytree(model, folder)
    (folder / file).parent.mkdir(exist_ok=True)
    write_safetensors(folder / file, heads(plain=True))
    assert load(str(model), heads="maker/pack")[0].info.acceptance[0] == 1.0
    assert sorted(stand_in.fetched) == sorted(["config.json", file])


def test_a_repository_of_heads_and_one_without(model: Path, stand_in: StandIn, cache: Path) -> None:
    split_folder(stand_in.remote / "maker" / "heads", heads(plain=True))
    assert load(str(model), heads="maker/heads")[0].info.acceptance[0] == 1.0
    stand_in.fetched.clear()
    shutil.copytree(model, stand_in.remote / "maker" / "trunk")
    with pytest.raises(MTPError, match="maker/trunk: none of its .* tensors is an MTP head's"):
        load(str(model), heads="maker/trunk")
    assert stand_in.fetched == ["config.json"]  # the weights' names were enough
    with pytest.raises(MTPError, match="there is no such repository"):
        load(str(model), heads="maker/nothing")
    with pytest.raises(MTPError, match="neither a folder nor a file nor a hub id"):
        load(str(model), heads="./nothing")
    assert len(names(cache)) == 1


def test_an_adapter_is_named_by_its_hub_id(
    model: Path, stand_in: StandIn, tmp_path: Path, cache: Path
) -> None:
    load(str(model), heads=split_folder(tmp_path / "split", heads(plain=True)))
    shutil.copytree(cache / names(cache)[0], stand_in.remote / "maker" / "adapter")
    attached, _ = load(str(model), "maker/adapter")
    assert isinstance(attached.speculator, MTPHeads)
    assert isinstance(load(str(model), heads="maker/adapter")[0].speculator, MTPHeads)
    stand_in.fails = ConnectionError("no network")
    assert load(str(model), "maker/adapter")[0].info == attached.info
    assert load(str(model), heads="maker/adapter")[0].info == attached.info
    stand_in.fails = None
    split_folder(stand_in.remote / "maker" / "heads", heads(plain=True))
    with pytest.raises(MTPError, match="maker/heads holds no adapter of mtp-mlx; .* name it with `heads`"):
        load(str(model), "maker/heads")


def run(*words: str | Path) -> Result:
    return CliRunner().invoke(main, [str(word) for word in words])


def test_the_command_line(model: Path, tmp_path: Path) -> None:
    source = split_folder(tmp_path / "split", heads(plain=True))
    words = (
        "generate",
        "-m",
        model,
        "-p",
        "the",
        "-n",
        "8",
        "--layout",
        "linear",
        "--json",
        "--heads",
        source,
    )
    result = run(*words)
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert report["heads"] == str(source) and report["tokens_per_step"] > 1.5
    both = run(*words, "--adapter", tmp_path)
    assert both.exit_code == 2 and "leave --adapter or --heads out" in both.stderr


def test_a_model_without_a_drafter_says_so_once(model: Path, tmp_path: Path) -> None:
    words = ("generate", "-p", "the", "-n", "2", "--layout", "tree", "-m")
    said = [line for line in run(*words, model).stderr.splitlines() if "no drafter" in line]
    assert len(said) == 1 and said[0].startswith(
        f"note: {model} has no drafter, so only repeated text is drafted: "
    )
    assert all(option in said[0] for option in ("--heads", "--draft-model", "--memory", "mtp-mlx train"))
    holds = original(tmp_path / "original", heads(plain=False), model, shards=False)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(model / name, holds / name)
    assert f"(Qwen3-Next / 3.5 to 3.8), which --heads {holds} takes over" in run(*words, holds).stderr
    drafted = run(*words, holds, "--heads", holds)
    assert drafted.exit_code == 0 and "no drafter" not in drafted.stderr
    for more in (("--adapter", "none"), ("--layout", "plain")):
        assert "no drafter" not in run(*words, model, *more).stderr


def test_a_folder_of_heads_alone_says_what_it_is(tmp_path: Path) -> None:
    source = split_folder(tmp_path / "split", heads(plain=True))
    shown = json.loads(run("info", source, "--json").stdout)
    assert shown["kind"] == "checkpoint" and shown["mtp heads"]["count"] == 1
    result = run("generate", "-m", source, "-p", "the")
    assert result.exit_code == 2 and "it holds MTP heads alone: name them with --heads" in result.stderr


def test_info_says_which_files_of_a_repository_hold_heads(model: Path, stand_in: StandIn) -> None:
    last = "model-00003-of-00003.safetensors"
    folder = original(stand_in.remote / "maker" / "original", heads(plain=False), model)
    shown = json.loads(run("info", "maker/original", "--json").stdout)
    assert shown["mtp heads"] == {"files": [last], "size": (folder / last).stat().st_size}
    shutil.copytree(model, stand_in.remote / "maker" / "trunk")
    assert "none: maker/trunk: none of its" in run("info", "maker/trunk").stdout
    assert not any(name.endswith(".safetensors") for name in stand_in.fetched)
