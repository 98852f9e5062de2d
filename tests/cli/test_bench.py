"""`bench` remembers plain speed by the length of prompts, and `--explain` shows the steps that were planned."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from mtp_mlx.cli import main
from mtp_mlx.measure import plain_speed
from tests.tiny import never_end, save_tiny


@pytest.mark.parametrize("words", [[3], [700], [3, 700]])
def test_plain_speed_is_remembered_by_length_of_prompt(
    words: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MTP_MLX_CACHE", str(tmp_path / "cache"))
    save_tiny(tmp_path / "model", "qwen3", seed=3)
    never_end(tmp_path / "model")
    rows = [{"prompt": "the " * count, "category": "a"} for count in words]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    model, few = str(tmp_path / "model"), ["-n", "40", "--layout", "plain", "--layout", "linear", "--lookup"]
    arguments = ["bench", "-m", model, "-a", "none", "-p", str(tmp_path / "prompts.jsonl"), *few]
    result = CliRunner().invoke(main, arguments, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    known = [plain_speed.recall(model, context=count) for count in (3, 700)]
    assert [speed is not None for speed in known] == [count in words for count in (3, 700)]
    assert len(words) == 1 or known[0] != known[1]


def test_explain_shows_the_planned_steps_of_the_prompts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MTP_MLX_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("MTP_MLX_TRACE", raising=False)
    save_tiny(tmp_path / "model", "qwen3", seed=3)
    never_end(tmp_path / "model")
    (tmp_path / "prompts.jsonl").write_text(json.dumps({"prompt": "the the the the"}) + "\n")
    arguments = ["bench", "-m", str(tmp_path / "model"), "-a", "none", "-p", str(tmp_path / "prompts.jsonl")]
    arguments += ["-n", "40", "--explain"]
    result = CliRunner().invoke(main, [*arguments, "--json"], catch_exceptions=False)
    report = json.loads(result.stdout)
    assert sum(form["tokens"] for form in report["planned"]["forms"]) == 40
    assert {"expected_seconds", "seconds", "lost_seconds"} <= set(report["planned"]["forms"][0])
    shown = CliRunner().invoke(main, arguments, catch_exceptions=False)
    assert "planned steps, expected and taken" in shown.output and "drafts by chance" in shown.output
    assert "planned" not in json.loads(CliRunner().invoke(main, [*arguments[:-1], "--json"]).stdout)
