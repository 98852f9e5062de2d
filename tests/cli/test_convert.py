"""`mtp-mlx convert` and `info` on checkpoints: plans, adapter folders, and files that are hostile or damaged."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from click.testing import CliRunner, Result

import mtp_mlx.cli as cli
from mtp_mlx import load
from tests.convert.adapters.test_peft import SLOTS, factors
from tests.convert.adapters.test_peft import folder as peft_folder
from tests.convert.checkpoints import write_safetensors, write_shards
from tests.convert.gguf.gguf_files import write_model
from tests.convert.heads.head_checkpoints import make, numbers
from tests.convert.read.hostile_pickles import hostile
from tests.convert.read.torch_files import write_torch, write_zip
from tests.convert.whole_checkpoints import whole
from tests.tiny import save_tiny


def run(*args: Any) -> Result:
    return CliRunner().invoke(cli.main, list(map(str, args)))


def refused(*args: Any) -> str:
    """The one sentence on stderr of a command that ends with exit code 2 and prints nothing else."""
    result = run(*args)
    assert (result.exit_code, result.stdout) == (2, ""), result.output
    lines = [line for line in result.stderr.strip().splitlines() if not line.startswith(cli.HOW_TO_MEND[:20])]
    assert len(lines) == 1 and lines[0].startswith("Error: "), result.stderr
    return lines[0]


def test_the_plan(tmp_path: Path) -> None:
    source = make("deepseek-v3").write(tmp_path / "model")
    result = run("convert", source, "--dry-run")
    assert result.exit_code == 0, result.output
    for line in (
        "family: DeepSeek-V3 / R1",
        "heads: 1",
        "  first hidden: post-norm",
        "block: mlx_lm.models.deepseek_v3.DeepseekV3DecoderLayer",
        "  heads.0.fuse.weight [48, 96] F32 <- model.layers.4.eh_proj.weight",
        "model.layers.4.mlp.experts.0.up_proj.weight .. model.layers.4.mlp.experts.2.up_proj.weight (3), stacked",
        "  model.layers.4.shared_head.head.weight = lm_head.weight",
    ):
        assert line in result.stdout
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    mimo = run("convert", make("mimo-7b").write(tmp_path / "mimo"), "--dry-run").stdout
    assert "model.mtp_layers.0.input_proj.weight, columns swapped to [embedding ; hidden]" in mimo


NO_MLX = """
import importlib.abc, sys
class Refuse(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("mlx", "mlx_lm", "transformers", "torch"):
            raise ImportError(f"{name} must not be imported")
sys.meta_path.insert(0, Refuse())
from click.testing import CliRunner
import mtp_mlx.cli as cli
for source in sys.argv[1:]:
    result = CliRunner().invoke(cli.main, ["convert", source, "--dry-run"])
    assert result.exit_code == 0, result.output
    print([line for line in result.stdout.splitlines() if line.startswith(("family", "architecture", "heads"))])
"""


def test_the_plan_needs_no_mlx(tmp_path: Path) -> None:
    """Where importing mlx fails, plans of all kinds of sources are made."""
    sources = [
        make(name).write(tmp_path / name) for name in ("qwen3-next experts", "deepseek-v3", "nemotron-h")
    ]
    torch_file = tmp_path / "medusa" / "medusa_lm_head.pt"
    sources += [write_torch(torch_file, medusa(tmp_path / "medusa")).parent, torch_file]
    sources += [peft_folder(tmp_path / "lora", factors() | SLOTS), write_model(tmp_path / "m.gguf").path]
    arguments = [sys.executable, "-c", NO_MLX, *map(str, sources)]
    done = subprocess.run(arguments, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    titles = ("Qwen3-Next", "DeepSeek-V3", "Nemotron-H", "Medusa", "Medusa", "PEFT", "llama")
    for line, title in zip(lines, titles, strict=True):
        assert title in line


def test_the_plan_of_what_has_no_heads(tmp_path: Path) -> None:
    model = save_tiny(tmp_path / "model")
    assert "heads: none" in run("convert", model, "--dry-run").stdout
    assert "holds no MTP heads of a known kind" in refused("convert", model, "--dry-run", "--heads-only")
    gguf = write_model(tmp_path / "m.gguf").path
    plan = run("convert", gguf, tmp_path / "out", "--dry-run")
    assert plan.exit_code == 0 and "architecture: llama" in plan.stdout and not (tmp_path / "out").exists()
    assert "not read from .gguf" in refused("convert", gguf, tmp_path / "out", "--heads-only")


def test_heads_become_an_adapter_folder(tmp_path: Path) -> None:
    source = make("qwen3-next experts").write(tmp_path / "model")
    result = run("convert", source, tmp_path / "heads", "--heads-only")
    assert result.exit_code == 0, result.output
    assert result.stdout.strip() == str(tmp_path / "heads")
    config = json.loads((tmp_path / "heads" / "mtp_config.json").read_text())
    assert config["heads"]["convention"]["zero_centred_norms"] is True
    assert "exists already" in refused("convert", source, tmp_path / "heads", "--heads-only")
    result = run("convert", source, tmp_path / "heads", "--heads-only", "--force", "--head-norms", "plain")
    assert result.exit_code == 0, result.output
    config = json.loads((tmp_path / "heads" / "mtp_config.json").read_text())
    assert config["heads"]["convention"]["zero_centred_norms"] is False


def test_heads_in_the_speculators_layout(tmp_path: Path) -> None:
    source = make("qwen3-next experts").write(tmp_path / "model")
    result = run("convert", source, tmp_path / "out", "--heads-only", "--heads-as", "speculators")
    assert result.exit_code == 0, result.output
    assert "family: speculators mtp" in run("convert", tmp_path / "out", "--dry-run").stdout


# --- whole checkpoints --------------------------------------------------------------------------------------


def test_a_whole_checkpoint(tmp_path: Path) -> None:
    made = whole("mimo-7b")
    source = made.write(tmp_path / "model")
    result = run("convert", source, tmp_path / "out")
    assert result.exit_code == 0, result.output
    assert result.stdout.strip() == str(tmp_path / "out")
    assert "heads: 1 of MiMo-7B," in result.stderr
    assert "exists already" in refused("convert", source, tmp_path / "out")
    assert run("convert", source).exit_code == 2 and "Missing argument 'OUT'" in run("convert", source).stderr
    result = run("convert", source, tmp_path / "out", "--force", "--trunk-only")
    assert result.exit_code == 0 and not (tmp_path / "out" / "mtp").exists()
    both = run("convert", source, tmp_path / "x", "--heads-only", "--trunk-only")
    assert both.exit_code == 2 and "give one of them" in both.stderr


def test_a_hub_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = whole("mimo-7b").write(tmp_path / "model")
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda name, allow_patterns: str(source))
    result = run("convert", "owner/mimo", tmp_path / "out")
    assert result.exit_code == 0 and (tmp_path / "out" / "mtp" / "mtp.safetensors").is_file(), result.output
    assert "--dry-run reads local files" in refused("convert", "owner/mimo", "--dry-run")


def test_the_heads_are_used_with_the_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`load(OUT)` and `generate --model OUT` find OUT/mtp; --adapter none leaves it; the text is the same."""
    monkeypatch.setenv("MTP_MLX_CACHE", str(tmp_path / "cache"))
    source = llama_with_heads(tmp_path / "model")
    assert run("convert", source, tmp_path / "out").exit_code == 0
    model, _ = load(str(tmp_path / "out"))
    assert model.most_drafts == 2 and model.info.convention.family == "deepseek-v3"
    model, _ = load(str(tmp_path / "out"), None)
    assert model.most_drafts == 0
    texts = []
    for adapter, layouts in (("auto", {f"{n}/2 heads" for n in range(3)}), ("none", {"0/0"})):
        options = ("-m", tmp_path / "out", "-a", adapter, "-n", "20", "--raw", "-p", "The sky", "--json")
        result = run("generate", *options, "--layout", "linear" if adapter == "auto" else "plain")
        assert result.exit_code == 0, result.output
        report = json.loads(result.stdout)
        texts.append(report["text"])
        assert set(report["stats"]["layouts"]) <= layouts or adapter == "none"
        assert bool(report["stats"]["acceptance"]) == (adapter == "auto")
    assert texts[0] == texts[1] != ""


def llama_with_heads(folder: Path) -> Path:
    """A tiny llama of `tests.tiny` with two random heads under DeepSeek's names."""
    save_tiny(folder, seed=3, num_hidden_layers=4)
    made = make("llama with own heads")
    stored: Any = mx.load(str(folder / "model.safetensors"))
    heads = {name: value for name, value in made.stored.items() if name.startswith("model.layers.")}
    widths = {56: 80}
    for name, value in heads.items():
        shape = tuple(widths.get(n, n) for n in value.shape)
        heads[name] = numbers(name, shape) * np.float32(0.2)
    write_safetensors(folder / "model.safetensors", {n: np.array(v) for n, v in stored.items()} | heads)
    config = json.loads((folder / "config.json").read_text()) | {"num_nextn_predict_layers": 2}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


# --- verify, base, other layouts ----------------------------------------------------------------------------


def test_verify(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mtp_mlx.convert.heads.verify.verify_folder.__defaults__", (("The sky",), 6))
    source = llama_with_heads(tmp_path / "model")
    result = run("convert", source, tmp_path / "out", "--verify")
    assert result.exit_code == 0, result.output
    assert "verify: acceptance per depth" in result.stderr and result.stdout == f"{tmp_path / 'out'}\n"
    config = json.loads((tmp_path / "out" / "mtp" / "mtp_config.json").read_text())
    assert config["measurements"]["verify"]["tokens"] == 5
    again = run("convert", tmp_path / "out", "--verify")
    assert again.exit_code == 0 and again.stdout.startswith("verify: acceptance per depth")
    assert again.stdout.count("head 1 would have") == 7  # random heads: every other convention was tried
    result = run("convert", source, tmp_path / "heads", "--heads-only", "--verify")
    assert result.exit_code == 0 and "verify: acceptance" in result.stderr, result.output
    assert "there are no converted heads to verify" in refused("convert", source, "--verify")


def test_conventions_as_asked_for(tmp_path: Path) -> None:
    source = make("mimo-7b").write(tmp_path / "model")
    options = (
        "--heads-only",
        "--head-order",
        "embedding",
        "--head-hidden",
        "post-norm",
        "--head-recycled",
        "raw",
    )
    assert run("convert", source, tmp_path / "heads", *options).exit_code == 0
    config = json.loads((tmp_path / "heads" / "mtp_config.json").read_text())
    convention = config["heads"]["convention"]
    assert (convention["stored_order"], convention["first_hidden"]) == ("embedding", "post-norm")
    assert convention["recycled_hidden"] == "raw"
    assert "the next draft takes the raw state (as asked for)" in config["source"]["notes"]
    assert "fuse weights are stored embedding-first (as asked for)" in config["source"]["notes"]
    stored: Any = mx.load(str(tmp_path / "heads" / "mtp.safetensors"))
    as_stored = make("mimo-7b").stored["model.mtp_layers.0.input_proj.weight"]
    np.testing.assert_array_equal(np.array(stored["heads.0.fuse.weight"]), as_stored)
    plan = run("convert", source, "--dry-run", "--head-order", "embedding").stdout
    assert "columns swapped" not in plan and "trunk: 3 tensors, through mlx-lm" in plan


def test_a_base_for_heads_that_come_without_one(tmp_path: Path) -> None:
    base = save_tiny(tmp_path / "base", "qwen3", seed=3)
    info = json.loads(run("info", base, "--json").stdout)
    source = make("speculators, qwen3").write(tmp_path / "model")
    result = run("convert", source, tmp_path / "heads", "--heads-only", "--base", base)
    assert result.exit_code == 0, result.output
    config = json.loads((tmp_path / "heads" / "mtp_config.json").read_text())
    assert config["base"] == {"name": "base", "fingerprint": info["fingerprint"]}
    nowhere = refused("convert", source, tmp_path / "x", "--heads-only", "--base", tmp_path / "none")
    assert "no model" in nowhere


def test_an_adapter_folder_in_the_speculators_layout_and_back(tmp_path: Path) -> None:
    source = make("mimo-7b").write(tmp_path / "model")
    for args in (
        (source, tmp_path / "a", "--heads-only"),
        (tmp_path / "a", tmp_path / "b", "--heads-only", "--heads-as", "speculators"),
        (tmp_path / "b", tmp_path / "c", "--heads-only"),
    ):
        result = run("convert", *args)
        assert result.exit_code == 0, result.output
    first, last = (mx.load(str(tmp_path / name / "mtp.safetensors")) for name in "ac")
    assert first.keys() == last.keys()
    assert all(mx.array_equal(first[name], last[name]) for name in first)
    assert "is an adapter folder already" in refused(
        "convert", tmp_path / "a", tmp_path / "d", "--heads-only"
    )


def test_a_peft_adapter(tmp_path: Path) -> None:
    base = save_tiny(tmp_path / "base", seed=3)
    source = peft_folder(tmp_path / "lora", factors() | SLOTS)
    assert "name that model's folder with --base" in refused(
        "convert", source, tmp_path / "out", "--heads-only"
    )
    assert "holds a LoRA adapter and no trunk" in refused("convert", source, tmp_path / "out")
    result = run("convert", source, tmp_path / "out", "--heads-only", "--base", base)
    assert result.exit_code == 0, result.output
    facts = json.loads(run("info", tmp_path / "out", "--json").stdout)
    assert (facts["method"], facts["base"]["name"], facts["shape"]["slots"]) == ("mask-tokens", "base", 3)
    model, _ = load(str(base), tmp_path / "out")
    assert model.most_drafts == 3
    facts = json.loads(run("info", source, "--json").stdout)
    assert facts["mtp heads"] == {"family": "PEFT LoRA adapter"}  # of no number, and no convention


# --- what would be lost, or ignored -------------------------------------------------------------------------


@pytest.mark.parametrize("place", ["the same", "above", "through a link"])
def test_force_does_not_delete_the_source(tmp_path: Path, place: str) -> None:
    """OUT may not be the folder that SOURCE is or lies in, in whichever layout it is written."""
    home = tmp_path / "home"
    source = make("mimo-7b").write(home if place != "above" else home / "model")
    gguf = write_model(home / "model.gguf").path
    peft = peft_folder(home / "lora", factors() | SLOTS)
    for name in ("config.json", "mtp_config.json"):
        if not (home / name).exists():
            (home / name).write_text("{}")
    (tmp_path / "link").symlink_to(home)
    out = tmp_path / "link" if place == "through a link" else home
    before = {path: path.read_bytes() for path in home.rglob("*") if path.is_file()}
    ways = [(source / "model.safetensors",), (source / "model.safetensors", "--heads-only"), (gguf,)]
    ways += [(peft, "--heads-only", "--base", save_tiny(tmp_path / "base", seed=3))]
    ways += [(source / "model.safetensors", "--heads-only", "--heads-as", "speculators")]
    for first, *options in ways:
        message = refused("convert", first, out, "--force", *options)
        assert f"{out} holds the source" in message and "--force would delete" in message
    assert {path: path.read_bytes() for path in home.rglob("*") if path.is_file()} == before


SILENT = {
    "--quantize and --dtype are for the trunk": ("--heads-only", "--quantize", "4"),
    "--quantize and --dtype are": ("--heads-only", "--dtype", "float16"),
    "the heads that --verify is about": ("--trunk-only", "--verify"),
    "the heads that --head-order is about": ("--trunk-only", "--head-order", "hidden"),
    "--dry-run reads no weights": ("--dry-run", "--verify"),
    "give --heads-only too": ("--heads-as", "speculators"),
    "leave --heads-as out": ("--heads-only", "--heads-as", "speculators", "--verify"),
    "--base is for heads and adapters": ("--base", "somewhere"),
}


@pytest.mark.parametrize("expected", list(SILENT))
def test_no_option_is_ignored_in_silence(tmp_path: Path, expected: str) -> None:
    source = make("mimo-7b").write(tmp_path / "model")
    result = run("convert", source, tmp_path / "out", *SILENT[expected])
    assert result.exit_code == 2 and expected in " ".join(result.stderr.split()), result.output
    assert not (tmp_path / "out").exists()
    assert run("convert", source, "--heads-only", "--verify").exit_code == 2


def test_options_of_heads_that_are_not_there(tmp_path: Path) -> None:
    """They are refused before anything is written, not after."""
    out, plain = tmp_path / "out", save_tiny(tmp_path / "plain", seed=3)
    for options in (("--verify",), ("--head-order", "hidden")):
        assert f"holds no MTP heads; leave {options[0]} out" in refused("convert", plain, out, *options)
        assert "MTP heads are not read" in refused(
            "convert", write_model(tmp_path / "m.gguf").path, out, *options
        )
    write_torch(tmp_path / "medusa" / "medusa_lm_head.pt", medusa(tmp_path / "medusa"))
    assert "heads of the kind Medusa have no conv" in refused(
        "convert", tmp_path / "medusa", out, "--heads-only", "--verify"
    )
    lora = peft_folder(tmp_path / "lora", factors() | SLOTS)
    assert "it is a PEFT adapter" in refused(
        "convert", lora, out, "--heads-only", "--base", plain, "--verify"
    )
    source = make("mimo-7b").write(tmp_path / "model")
    assert run("convert", source, tmp_path / "heads", "--heads-only").exit_code == 0
    assert "--head-order comes too late" in refused(
        "convert",
        tmp_path / "heads",
        out,
        "--heads-only",
        "--heads-as",
        "speculators",
        "--head-order",
        "hidden",
    )
    assert not out.exists()


# --- info ---------------------------------------------------------------------------------------------------


def test_info_of_a_gguf_file(tmp_path: Path) -> None:
    path = write_model(tmp_path / "m.gguf").path
    facts = json.loads(run("info", path, "--json").stdout)
    assert (facts["container"], facts["type"], facts["size"]) == ("gguf", "llama", path.stat().st_size)
    assert "none are read" in facts["mtp heads"]
    assert f"give one of those in it, as in {path}" in refused("convert", tmp_path, tmp_path / "out")


def test_info_of_checkpoints_and_heads(tmp_path: Path) -> None:
    source = make("mimo-7b").write(tmp_path / "model")
    facts = json.loads(run("info", source, "--json").stdout)
    assert facts["kind"] == "model" and facts["mtp heads"]["family"] == "MiMo-7B"
    facts = json.loads(run("info", source / "model.safetensors", "--json").stdout)
    assert facts["kind"] == "checkpoint" and facts["mtp heads"]["count"] == 1
    run("convert", source, tmp_path / "heads", "--heads-only")
    facts = json.loads(run("info", tmp_path / "heads", "--json").stdout)
    assert (facts["kind"], facts["method"], facts["heads"]) == ("adapter", "mtp-heads", 1)
    assert facts["convention"]["stored order"] == "hidden"
    text = run("info", tmp_path / "heads").stdout
    assert "method: mtp-heads" in text and "  first hidden: pre-norm" in text
    whole("mimo-7b").write(source)
    assert run("convert", source, tmp_path / "out").exit_code == 0
    facts = json.loads(run("info", tmp_path / "out", "--json").stdout)
    assert facts["kind"] == "model" and facts["usable"] == "yes"
    assert facts["adapter beside it"]["family"] == "MiMo-7B"
    assert facts["adapter beside it"]["base"]["fingerprint"] == facts["fingerprint"]
    (tmp_path / "heads" / "mtp_config.json").write_text('{"method": "mtp-heads"}')
    assert "mtp_config.json is damaged" in refused("info", tmp_path / "heads")


def test_info_of_pytorch_files(tmp_path: Path) -> None:
    path = write_torch(tmp_path / "medusa" / "medusa_lm_head.pt", medusa(tmp_path / "medusa"))
    for where in (path, path.parent):
        facts = json.loads(run("info", where, "--json").stdout)
        assert (facts["container"], facts["mtp heads"]["family"]) == ("pytorch", "Medusa")


def medusa(folder: Path) -> dict[str, np.ndarray]:
    """Medusa's tensors, and the folder for them."""
    folder.mkdir()
    shapes = {"0.0.linear.weight": (8, 8), "0.0.linear.bias": (8,), "0.1.weight": (9, 8)}
    return {name: np.ones(shape, np.float32) for name, shape in shapes.items()}


# --- hostile and damaged ------------------------------------------------------------------------------------


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
        assert f"its pickle names {name}, which is no tensor record" in message
    assert [path.name for path in tmp_path.iterdir()] == ["model"]  # no marker, no output, nothing temporary


HEADS, TRUNK = "model.layers.4.eh_proj.weight", "model.layers.1.mlp.gate.weight"


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
        "wrong type": f"{key} is of type {'I32' if key == HEADS else 'int32'}, a float type expected",
        "wrong shape": f"{key} is {[shape[0], shape[1] - 1]}, {shape} expected",
        "truncated shard": "b.safetensors: the file is truncated",
        "missing shard": "1 of which are missing: b.safetensors",
    }[kind]


@pytest.mark.parametrize("key", [HEADS, TRUNK], ids=["heads", "trunk"])
@pytest.mark.parametrize("kind", ["wrong type", "wrong shape", "truncated shard", "missing shard"])
def test_a_damaged_checkpoint_is_one_sentence(tmp_path: Path, kind: str, key: str) -> None:
    expected = damaged(tmp_path / "model", kind, key)
    assert expected in refused("convert", tmp_path / "model", tmp_path / "out")
    assert expected in refused("convert", tmp_path / "model", tmp_path / "out", "--quantize", "4")
    if key == HEADS:
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


def test_a_type_that_no_one_knows(tmp_path: Path) -> None:
    write_safetensors(tmp_path / "m.safetensors", {"w": np.ones(8, np.uint8)}, {"w": "F4"})
    assert "tensor 'w' has the type F4" in refused("convert", tmp_path / "m.safetensors", "--dry-run")
