"""Proves that a prompt beyond the model's context is warned of once, before it is read, and not as a fallback."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from mtp_mlx import files
from mtp_mlx.cli import main
from tests.tiny import never_end, save_tiny

NOTE = "note: the prompt has"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A context of 40 tokens, more than the chat template and a word take."""
    folder = tmp_path_factory.mktemp("context") / "model"
    save_tiny(folder, "llama", seed=3, max_position_embeddings=40)
    never_end(folder)
    return folder


def run(model: Path, tmp_path: Path, *words: str, stdin: str | None = None) -> Result:
    environment = {"MTP_MLX_CACHE": str(tmp_path / "cache")}
    options = ["-m", str(model), "-a", "none", "--layout", "plain", "-n", "4"]
    result = CliRunner().invoke(main, [*words, *options], input=stdin, env=environment)
    assert result.exit_code == 0, result.output
    return result


@pytest.mark.parametrize("long", [False, True])
def test_generate(model: Path, tmp_path: Path, long: bool) -> None:
    result = run(model, tmp_path, "generate", "-p", "the " * (60 if long else 1), "--json")
    report = json.loads(result.stdout)
    assert (report["prompt_tokens"] > 40) == long
    assert result.stderr.count(NOTE) == len(report["stats"]["notes"]) == long
    assert not report["stats"]["fallbacks"]
    if long:
        assert result.output.index(NOTE) < result.output.index('"text"')


def test_chat(model: Path, tmp_path: Path) -> None:
    """The note comes before the answer to the message that makes the conversation too long, and only there."""
    result = run(model, tmp_path, "chat", stdin="the\n" + "the " * 60 + "\nthe\n/stats\n")
    assert result.stderr.count(NOTE) == 1
    before, _, after = result.output.partition(NOTE)
    assert before.count("Cut off after 4 tokens") == 1 and after.count("Cut off after 4 tokens") == 2


@pytest.mark.parametrize("verb", ["bench", "eval", "tune", "distill"])
def test_verbs_that_run_many_prompts(
    verb: str, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Of the first that is too long, in the log."""
    monkeypatch.setenv("MTP_MLX_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(files, "_warned", {})
    rows = [{"prompt": "the " * count} for count in (1, 60, 70)]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    prompts = {"eval": "-q"}.get(verb, "-p")
    own = {
        "bench": ["-n", "4", "--layout", "plain"],
        "distill": ["--max-tokens", "4", "-o", str(tmp_path / "out.jsonl")],
    }.get(verb, ["-n", "4"])
    adapter = [] if verb == "distill" else ["-a", "none"]
    words = [verb, "-m", str(model), *adapter, prompts, str(tmp_path / "prompts.jsonl"), *own]
    with caplog.at_level("WARNING", "mtp_mlx"):
        result = CliRunner().invoke(main, words)
    assert result.exit_code == 0, result.output
    assert caplog.text.count("the model's context is 40") == 1
