"""Proves that the plain speed that `bench` measures is remembered for prompts of that length and for no others."""

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
