"""Unverified emission from the command line: generate, bench and eval say `lossless: false` wherever it holds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

import mtp_mlx.cli as cli
from mtp_mlx.drafters.masks.folder import mask_header
from mtp_mlx.drafters.masks.folder import save as save_adapter
from mtp_mlx.drafters.ptp.folder import ptp_header
from mtp_mlx.drafters.ptp.folder import save as save_ptp
from mtp_mlx.model.fingerprint import base_fingerprint
from tests.drafters.ptp.ptp_fakes import random_ptp_adapter
from tests.model.naive import random_adapter
from tests.tiny import save_tiny, tiny_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("emission")
    save_tiny(root / "model", "llama", seed=3)
    model = tiny_model("llama", seed=3)
    adapter = random_adapter(model, sampler_width=0, shared_mask=True)
    save_adapter(root / "adapter", adapter, mask_header(adapter.config, "tiny", base_fingerprint(model)))
    return root


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MTP_MLX_CACHE", str(tmp_path / "cache"))


def run(folder: Path, verb: str, *args: str) -> Result:
    options = ["-m", str(folder / "model"), "--adapter", str(folder / "adapter")]
    return CliRunner().invoke(cli.main, [verb, *options, *args])


def generate(folder: Path, *args: str) -> Any:
    result = run(folder, "generate", "--prompt", "The sky", "-n", "20", "--json", *args)
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def test_generate_json(folder: Path) -> None:
    plain = generate(folder, "--layout", "plain")
    assert plain["lossless"] is True and plain["emit"] == "verified" and plain["tau"] is None
    static = generate(folder, "--emit", "static", "--slots", "3")
    assert static["lossless"] is False and static["stats"]["lossless"] is False
    assert static["steps"] == 5 and static["generation_tokens"] == 20 and static["acceptance"] == []
    adapt = generate(folder, "--emit", "conf-adapt")
    assert adapt["tau"] == 0.9 and adapt["lossless"] is False
    for same in (
        ("--emit", "conf-adapt", "--tau", "1"),
        ("--tau", "0.3"),
        ("--tau", "0.3", "--layout", "linear"),
    ):
        report = generate(folder, *same)
        assert report["tokens"] == plain["tokens"]
        assert report["lossless"] is (same[0] == "--tau")


def test_generate_statistics_line(folder: Path) -> None:
    lossy = run(folder, "generate", "--prompt", "The sky", "-n", "20", "--emit", "conf-adapt", "--tau", "0.2")
    assert "· conf-adapt tau 0.2 4 · lossless: false ·" in lossy.stderr
    verified = run(
        folder, "generate", "--prompt", "The sky", "-n", "20", "--tau", "0.2", "--layout", "linear"
    )
    assert "· linear tau 0.2 4 ·" in verified.stderr and "lossless" not in verified.stderr
    planned = run(folder, "generate", "--prompt", "The sky", "-n", "20", "--tau", "0.2")
    assert "· quadratic tau 0.2 4 ·" in planned.stderr


def test_generate_samples_first_tokens(folder: Path) -> None:
    options = ("--emit", "conf-adapt", "--tau", "1", "--first-token-sampling", "--temp", "1", "--seed", "4")
    sampled = generate(folder, *options)
    assert sampled["tokens"] == generate(folder, "--temp", "1", "--seed", "4", "--layout", "plain")["tokens"]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("--emit", "static", "--temp", "0.7"), "add --first-token-sampling"),
        (("--emit", "static", "--tau", "0.7"), "has no tau"),
        (("--tau", "0"), "above 0 and at most 1"),
        (("--emit", "conf-adapt", "--lookup"), "must be verified"),
        (("--emit", "conf-adapt", "--layout", "plain"), "cannot be combined with layout 'plain'"),
        (("--emit", "conf-adapt", "--adapter", "none"), "needs an adapter with mask tokens"),
    ],
)
def test_generate_refuses(folder: Path, args: tuple[str, ...], message: str) -> None:
    result = run(folder, "generate", "--prompt", "The sky", *args)
    assert result.exit_code == 2 and message in result.stderr and result.stdout == ""


def test_bench_labels_lossy_lanes(folder: Path, tmp_path: Path) -> None:
    prompts = tmp_path / "p.jsonl"
    prompts.write_text('{"prompt": "The sky"}\n{"prompt": "add"}\n')
    common = ("--prompts", str(prompts), "--max-tokens", "12")
    result = run(folder, "bench", *common, "--emit", "conf-adapt", "--tau", "0.05", "--tau", "1", "--json")
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    rows = {row["lane"]: row for row in report["rows"]}
    assert set(rows) == {"conf-adapt tau 0.05", "conf-adapt tau 1"}
    assert {row["lossless"] for row in rows.values()} == {False}
    assert rows["conf-adapt tau 1"]["identical"] == 2
    lossy = rows["conf-adapt tau 0.05"]
    assert lossy["identical"] < 2 and lossy["refused"] == 0 and lossy["speedup"] is not None
    assert {m["verdict"] for m in report["mismatches"]} == {"different, lossless: false"}
    verified = run(folder, "bench", *common, "--tau", "0.3", "--json")
    assert json.loads(verified.stdout)["rows"][0]["lane"] == "quadratic tau 0.3"
    assert [row["lossless"] for row in json.loads(verified.stdout)["rows"]] == [True]
    assert json.loads(verified.stdout)["rows"][0]["identical"] == 2
    text = run(folder, "bench", *common, "--emit", "static", "--limit", "1")
    assert "lossless: false" in " ".join(text.stdout.split())
    refused = run(folder, "bench", *common, "--emit", "static", "--lookup")
    assert refused.exit_code == 2 and "must be verified" in refused.stderr


def test_eval(folder: Path, tmp_path: Path) -> None:
    questions = tmp_path / "q.jsonl"
    questions.write_text('{"question": "The sky", "answer": "#### 3"}\n{"question": "add"}\n')
    options = ("--sweep-tau", "--questions", str(questions), "-n", "10", "--tau", "0.05", "--tau", "0.9")
    kept = ("--out", str(tmp_path / "s.jsonl"), "--svg", str(tmp_path / "s.svg"))
    result = run(folder, "eval", *options, *kept, "--json")
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert report["finished"] and [row["tau"] for row in report["rows"]] == [None, 0.9, 0.05]
    assert [row["lossless"] for row in report["rows"]] == [True, False, False]
    assert len((tmp_path / "s.jsonl").read_text().splitlines()) == 6
    assert (tmp_path / "s.svg").read_text().startswith("<svg")
    again = run(folder, "eval", *options, *kept)
    assert again.exit_code == 0 and "tok/pass" in again.stdout and "plain" in again.stdout
    assert len((tmp_path / "s.jsonl").read_text().splitlines()) == 6, "nothing is measured twice"
    none = run(folder, "eval", "--sweep-tau", "--adapter", "none")
    assert none.exit_code == 2 and "needs mask tokens" in none.stderr


@pytest.mark.parametrize("variant", ["o", "c"])
def test_ptp_adapters(folder: Path, tmp_path: Path, variant: str) -> None:
    """Unverified emission and the sweep refuse them; verified output says that it is lossless."""
    model = tiny_model("llama", seed=3)
    adapter = random_ptp_adapter(model, variant=variant)
    save_ptp(tmp_path / "ptp", adapter, ptp_header(adapter.config, "tiny", base_fingerprint(model)))
    own = ("--adapter", str(tmp_path / "ptp"))
    for emit in ("static", "conf-adapt"):
        for verb in ("generate", "bench"):
            prompt = ("--prompt", "The sky") if verb == "generate" else ("--limit", "1")
            refused = run(folder, verb, *prompt, *own, "--emit", emit)
            assert refused.exit_code == 2 and "Parallel Token Prediction" in refused.stderr
    sweep = run(folder, "eval", "--sweep-tau", *own)
    assert sweep.exit_code == 2 and "needs mask tokens" in sweep.stderr
    verified = generate(folder, *own, "--temp", "0.8", "--tau", "0.1")
    assert verified["lossless"] is True and verified["stats"]["lossless"] is True
    plain = generate(folder, *own, "--temp", "0.8", "--layout", "plain")
    assert verified["tokens"] == plain["tokens"]
