"""Proves that the benchmark compares every text with its answer, and shows the planned steps of these texts alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import planner_run
import pytest
from click.testing import CliRunner

import mtp_mlx.cli as cli
from tests.tiny import never_end, save_tiny

ANSWERS, LENGTH = 3, 40


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model and its greedy answers."""
    root = tmp_path_factory.mktemp("planner_run")
    save_tiny(root / "model", "llama", seed=3)
    never_end(root / "model")
    prompts = [json.dumps({"prompt": f"add {i}"}) for i in range(ANSWERS)]
    (root / "prompts.jsonl").write_text("\n".join(prompts))
    options = [
        "-m",
        str(root / "model"),
        "--prompts",
        str(root / "prompts.jsonl"),
        "--max-tokens",
        str(LENGTH),
    ]
    made = CliRunner().invoke(cli.main, ["distill", *options, "--out", str(root / "answers.jsonl")])
    assert made.exit_code == 0, made.output
    return root


def run(folder: Path, data: Path, *more: str) -> Any:
    """The benchmark, in this process."""
    options = ["--model", str(folder / "model"), "--data", str(data)]
    return CliRunner().invoke(planner_run.main, [*options, *more])


@pytest.fixture(autouse=True)
def in_this_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MTP_MLX_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(planner_run, "prefer_openblas", lambda: None)


def test_all_texts_and_their_steps(folder: Path) -> None:
    result = run(folder, folder / "answers.jsonl", "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert (found["answers"], found["equal"]) == (ANSWERS, ANSWERS)
    assert found["tokens"] == ANSWERS * LENGTH >= found["steps"] > 0
    forms = found["planned"]["forms"]
    # The first token of a text comes with its prompt, in a step that is not planned.
    assert sum(form["tokens"] for form in forms) <= found["tokens"]
    assert 0 < sum(form["seconds"] for form in forms) < found["seconds"]


def test_a_text_that_differs_is_told(folder: Path, tmp_path: Path) -> None:
    rows = [json.loads(line) for line in (folder / "answers.jsonl").read_text().splitlines()]
    rows[1]["response_tokens"][-1] += 1
    (tmp_path / "wrong.jsonl").write_text("\n".join(map(json.dumps, rows)))
    result = run(folder, tmp_path / "wrong.jsonl")
    assert result.exit_code == 1
    assert f"{ANSWERS - 1} of {ANSWERS} texts equal" in result.stdout


def test_data_that_is_missing_is_one_sentence(folder: Path, tmp_path: Path) -> None:
    result = run(folder, tmp_path / "none.jsonl")
    assert result.exit_code == 2 and "none.jsonl" in result.output and "Traceback" not in result.output
