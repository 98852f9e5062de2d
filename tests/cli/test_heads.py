"""Proves that a folder of MTP heads works from the command line: generate, info, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import mlx.core as mx
import mlx_lm
import pytest
from click.testing import CliRunner, Result

import mtp_mlx.cli as cli
from mtp_mlx import generate, load
from mtp_mlx.drafters.heads.cascade import MTPHeads
from mtp_mlx.drafters.heads.convention import HeadConvention
from mtp_mlx.drafters.heads.folder import LAST_LAYER, HeadsConfig, heads_header
from mtp_mlx.drafters.heads.folder import save as save_heads
from mtp_mlx.model.fingerprint import base_fingerprint
from tests.drafters.heads.test_mtp_head import random_heads
from tests.tiny import VOCABULARY, save_tiny, tiny_model

COUNT = 30


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model, three random heads for it with a draft vocabulary, and another model."""
    root = tmp_path_factory.mktemp("heads")
    save_tiny(root / "model", "qwen3", seed=3)
    save_tiny(root / "other", "qwen3", seed=4)
    model = tiny_model("qwen3", seed=3)
    convention = HeadConvention("test")
    heads = MTPHeads(
        random_heads(model, 3, convention).heads, convention, mx.arange(0, VOCABULARY, 2, dtype=mx.int32)
    )
    info = heads_header(HeadsConfig(convention, [dict(LAST_LAYER)] * 3), "tiny", base_fingerprint(model))
    save_heads(root / "heads", heads, info)
    return root


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MTP_MLX_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def expected(folder: Path) -> str:
    """mlx-lm's own text."""
    model, tokenizer = mlx_lm.load(str(folder / "model"))[:2]
    return mlx_lm.generate(model, tokenizer, "The sky", max_tokens=COUNT)


def run(folder: Path, *args: str, model: str = "model") -> Result:
    """`mtp-mlx generate` in this process."""
    options = [
        "-m",
        str(folder / model),
        "-a",
        str(folder / "heads"),
        "-n",
        str(COUNT),
        "--raw",
        "-p",
        "The sky",
    ]
    return CliRunner().invoke(cli.main, ["generate", *options, *args])


@pytest.mark.parametrize("layout", ["auto", "linear", "plain"])
def test_the_text_is_that_of_mlx_lm(folder: Path, expected: str, layout: str) -> None:
    result = run(folder, "--layout", layout, "--json")
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert report["text"] == expected and report["lossless"] is True
    assert report["slots"] == (0 if layout == "plain" else 3)
    if layout == "linear":
        assert set(report["stats"]["layouts"]) <= {f"{drafts}/3 heads" for drafts in range(4)}


def test_more_drafts_than_heads(folder: Path, expected: str) -> None:
    result = run(folder, "--layout", "linear", "--slots", "5", "--json")
    report = json.loads(result.stdout)
    assert report["text"] == expected and report["slots"] == 5
    assert "5/5 heads" in report["stats"]["layouts"] and len(report["stats"]["acceptance"]) == 5


def test_a_loop_applies_the_heads_again_and_says_so(folder: Path, expected: str) -> None:
    """The same drafts as with that many slots; heads 1, 2, 3, 1, 2, each time around with caches of their own."""
    looped = json.loads(run(folder, "--layout", "linear", "--loop", "5", "--json").stdout)
    slots = json.loads(run(folder, "--layout", "linear", "--slots", "5", "--json").stdout)
    assert looped["text"] == expected and looped["slots"] == 5
    assert looped["stats"] == slots["stats"] and looped["stats"]["looped"] == "3 heads to 5 drafts"
    assert "linear 5 (3 heads to 5 drafts)" in run(folder, "--layout", "linear", "--loop", "5").stderr
    plain = json.loads(run(folder, "--layout", "linear", "--loop", "3", "--json").stdout)
    assert plain["stats"]["looped"] == ""


@pytest.mark.parametrize("layout", ["auto", "linear"])
@pytest.mark.parametrize(
    "options",
    [["--drafter", "heads,lookup"], ["--exact"], ["--drafter", "lookup,heads", "--loop", "5", "--exact"]],
    ids=" ".join,
)
def test_with_everything_else(folder: Path, expected: str, layout: str, options: list[str]) -> None:
    """Together with drafts of the text itself, with exact rows, and with a loop."""
    result = run(folder, "--layout", layout, "--json", *options)
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert report["text"] == expected and report["lossless"] is True
    drafters = set(report["stats"]["submitted_by"])
    assert drafters <= ({"heads", "lookup"} if "--drafter" in options or layout == "auto" else {"heads"})
    assert layout == "auto" or "heads" in drafters


def test_bench_of_a_loop(folder: Path, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text(json.dumps({"prompt": "The sky", "category": "a"}) + "\n")
    args = ["-m", str(folder / "model"), "--adapter", str(folder / "heads"), "--prompts", str(prompts)]
    result = CliRunner().invoke(
        cli.main, ["bench", *args, "--layout", "linear", "--loop", "4", "--max-tokens", "8", "--json"]
    )
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert report["loop"] == 4 and len(report["rows"][0]["acceptance"]) == 4


def test_python_calls(folder: Path, expected: str) -> None:
    model, tokenizer = load(str(folder / "model"), folder / "heads")
    assert model.most_drafts == 3 and model.info.own["heads"]["convention"]["family"] == "test"
    assert generate(model, tokenizer, "The sky", COUNT, layout="linear") == expected
    model.detach()
    assert model.speculator is None


@pytest.mark.parametrize(
    ("model", "args", "message"),
    [
        ("model", ["--layout", "quadratic"], "slots, not for MTP heads"),
        ("model", ["--layout", "linear", "--slots", "40"], "drafts per step must be 1 to 16"),
        (
            "model",
            ["--loop", "2"],
            "--loop 2 is less than the number of heads, 3: use --drafts to draft fewer",
        ),
        ("model", ["--loop", "17"], "must be at most 16"),
        ("model", ["--loop", "5", "-a", "none"], "--loop reuses MTP heads, and there are none here"),
        ("other", [], "made for base 'tiny'"),
    ],
)
def test_what_is_refused(folder: Path, model: str, args: list[str], message: str) -> None:
    result = run(folder, *args, model=model)
    assert result.exit_code == 2 and result.stdout == ""
    assert message in " ".join(result.stderr.split()) and "Traceback" not in result.stderr


def test_info_names_the_heads(folder: Path) -> None:
    result = CliRunner().invoke(cli.main, ["info", str(folder / "heads"), "--json"])
    assert result.exit_code == 0, result.output
    facts = json.loads(result.stdout)
    assert facts["method"] == "mtp-heads" and facts["heads"] == 3 and facts["family"] == "test"
    assert facts["base"]["name"] == "tiny" and facts["acceptance"] == "not measured"
