"""`mtp-mlx convert` on checkpoints of every kind: what it writes, and which options it refuses together."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mtp_mlx import load
from tests.cli.convert_runs import llama_with_heads, medusa, refused, run
from tests.convert.adapters.test_peft import SLOTS, factors
from tests.convert.adapters.test_peft import folder as peft_folder
from tests.convert.gguf.gguf_files import write_model
from tests.convert.heads.head_checkpoints import make
from tests.convert.read.torch_files import write_torch
from tests.convert.whole_checkpoints import whole
from tests.tiny import save_tiny

ONCE: dict[str, tuple[str, ...]] = {
    "whole": (),
    "whole and measured": ("--verify",),
    "whole, with a convention": ("--head-recycled", "raw"),
    "trunk only": ("--trunk-only",),
    "heads only": ("--heads-only",),
    "heads only, measured": ("--heads-only", "--verify"),
    "speculators": ("--heads-only", "--heads-as", "speculators"),
    "plan": ("--dry-run",),
    "plan of the heads": ("--dry-run", "--heads-only"),
}


@pytest.mark.parametrize("way", list(ONCE))
def test_the_source_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, way: str) -> None:
    """Headers are read once and heads are searched once, whichever way the command takes."""
    monkeypatch.setattr("mtp_mlx.convert.heads.verify.PROMPTS", ("The sky",))
    monkeypatch.setattr("mtp_mlx.convert.heads.verify.verify_folder.__defaults__", (6,))
    source, calls = llama_with_heads(tmp_path / "model"), []

    def counted(where: str) -> None:
        module, name = where.rsplit(".", 1)
        own = getattr(importlib.import_module(module), name)

        def call(*arguments: Any) -> Any:
            calls.append(name)
            return own(*arguments)

        monkeypatch.setattr(where, call)

    counted("mtp_mlx.convert.read.checkpoint.read_safetensors")
    counted("mtp_mlx.convert.heads.plan.find_cascade")
    result = run("convert", source, tmp_path / "out", *ONCE[way])
    assert result.exit_code == 0, result.output
    assert sorted(calls) == ["find_cascade", "read_safetensors"]


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
    assert model.most_drafts == 2 and model.info.own["heads"]["convention"]["family"] == "deepseek-v3"
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


# --- verify, base, other layouts ----------------------------------------------------------------------------


def test_verify(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mtp_mlx.convert.heads.verify.PROMPTS", ("The sky",))
    monkeypatch.setattr("mtp_mlx.convert.heads.verify.verify_folder.__defaults__", (6,))
    source = llama_with_heads(tmp_path / "model")
    result = run("convert", source, tmp_path / "out", "--verify")
    assert result.exit_code == 0, result.output
    assert "verify: acceptance per depth" in result.stderr and result.stdout == f"{tmp_path / 'out'}\n"
    config = json.loads((tmp_path / "out" / "mtp" / "mtp_config.json").read_text())
    assert config["measurements"]["verify"]["tokens"] == 5
    again = run("convert", tmp_path / "out", "--verify")
    assert again.exit_code == 0 and again.stdout.startswith("verify: acceptance per depth")
    assert (
        again.stdout.count("acceptance of head 1 would be") == 11
    )  # random heads: every other convention was tried
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
    assert (config["base"]["name"], config["base"]["fingerprint"]) == ("base", info["fingerprint"])
    assert config["base"]["sample"]["form"] == "float32"
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
    assert "give the model's folder with --base" in refused(
        "convert", source, tmp_path / "out", "--heads-only"
    )
    assert "contains a LoRA adapter but no trunk" in refused("convert", source, tmp_path / "out")
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
    "the heads that --verify is for": ("--trunk-only", "--verify"),
    "the heads that --head-order is for": ("--trunk-only", "--head-order", "hidden"),
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
        assert f"there are no MTP heads; leave {options[0]} out" in refused("convert", plain, out, *options)
        assert "MTP heads are not read" in refused(
            "convert", write_model(tmp_path / "m.gguf").path, out, *options
        )
    write_torch(tmp_path / "medusa" / "medusa_lm_head.pt", medusa(tmp_path / "medusa"))
    assert "Medusa heads have no conventions for --verify" in refused(
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
