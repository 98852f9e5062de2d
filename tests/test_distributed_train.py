"""Proves that two processes train as one with twice the micro-batches, write once, resume, and end if one is lost."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from click.testing import CliRunner

from mtp_mlx.adapter_folder import read_header
from mtp_mlx.cli import main
from tests.launched import Launched
from tests.tiny import save_tiny

STEPS = 4
SMALL = {
    "steps": STEPS,
    "warmup": 2,
    "draft_vocab": 60,
    "measure_every": 0,
    "save_every": 2,
    "held_out": 2,
    "batch_size": 1,
    "slots": 2,
    "rank": 3,
    "sampler_width": 16,
    "ema": 0.8,
}
Run = tuple[list[dict[str, Any]], dict[str, np.ndarray]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model and data: rows of different lengths, so that processes have different numbers of rows."""
    folder = tmp_path_factory.mktemp("two")
    save_tiny(folder / "model", "llama", seed=3)
    rows = [{"prompt": f"print({n})", "response": "the fox and the dog " * (1 + n % 5)} for n in range(14)]
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def arguments(folder: Path, out: str, **changes: Any) -> list[str]:
    values = {
        **SMALL,
        "model": folder / "model",
        "data": folder / "data.jsonl",
        "out": folder / out,
        **changes,
    }
    pairs = ((f"--{name.replace('_', '-')}", str(value)) for name, value in values.items())
    return ["train", *(part for pair in pairs for part in pair), "--json"]


def results(folder: Path, out: str) -> Run:
    """The metrics without times, and the tensors of the checkpoint: weights in float32, optimizer state."""
    lines = (folder / f"{out}.metrics.jsonl").read_text().splitlines()
    rows = [{key: value for key, value in json.loads(line).items() if key != "seconds"} for line in lines]
    tensors = mx.load(str(folder / f"{out}.checkpoint.safetensors"))
    assert isinstance(tensors, dict)
    return rows, {name: np.array(value) for name, value in tensors.items()}


def alike(one: Run, other: Run) -> None:
    """The same curve and the same adapter, to float tolerance."""
    assert [row["step"] for row in one[0]] == [row["step"] for row in other[0]]
    for mine, theirs in zip(*(run[0] for run in (one, other)), strict=True):
        assert mine.keys() == theirs.keys()
        for name, value in mine.items():
            if name == "parts":
                assert mine["parts"] == pytest.approx(theirs["parts"], rel=1e-4)
            else:
                assert value == pytest.approx(theirs[name], rel=1e-4), (name, mine, theirs)
    assert one[1].keys() == other[1].keys()
    for name, value in one[1].items():
        np.testing.assert_allclose(value, other[1][name], rtol=2e-3, atol=2e-5, err_msg=name)


@pytest.fixture(scope="module")
def alone(folder: Path) -> Run:
    """One process with two micro-batches."""
    result = CliRunner().invoke(main, arguments(folder, "alone", micro_batches=2))
    assert result.exit_code == 0, result.output
    return results(folder, "alone")


def test_two_processes_train_as_one_with_twice_the_micro_batches(
    folder: Path, alone: Run, tmp_path: Path
) -> None:
    stdout, stderr = Launched(2, ["cli", *arguments(folder, "two", micro_batches=1)], tmp_path).finish()
    summary = json.loads(stdout)  # one object: only the first process prints
    assert summary["steps"] == STEPS and summary["resumed_from"] is None, stderr
    assert stderr.count("held out;") + stderr.count("memory, estimated: ") == 1
    alike(results(folder, "two"), alone)
    assert len({row["rows"] for row in alone[0] if "rows" in row}) > 1  # or the weighting shows nothing
    assert read_header(folder / "two").training == read_header(folder / "alone").training


def wait_for(condition: Callable[[], bool], seconds: float = 200) -> None:
    for _ in range(int(seconds / 0.02)):
        if condition():
            return
        time.sleep(0.02)
    raise TimeoutError


def steps_done(folder: Path, out: str) -> int:
    path = folder / f"{out}.metrics.jsonl"
    return len(path.read_text().splitlines()) if path.exists() else 0


def test_a_killed_process_ends_the_run_which_then_goes_on(folder: Path, alone: Run, tmp_path: Path) -> None:
    """Longer first, so that there is time to kill; the same command continues, and so would one process."""
    words = ["cli", *arguments(folder, "killed", micro_batches=1, steps=400, schedule="constant")]
    launched = Launched(2, words, tmp_path)
    wait_for(lambda: steps_done(folder, "killed") >= 3)
    os.kill(launched.pid(1), signal.SIGKILL)
    stdout, stderr = launched.finish()
    assert stdout == ""
    if launched.code(0) is not None:  # else mlx.launch ended the other one before it could say why
        assert launched.code(0) == 2 and "Error (process 1 of 2): " in stderr
        assert "another process of this run was lost" in stderr
    first = steps_done(folder, "killed")
    assert 3 <= first < 400 and not (folder / "killed").exists()

    again = Launched(2, words, tmp_path)
    wait_for(lambda: steps_done(folder, "killed") > first)
    os.kill(again.pid(1), signal.SIGTERM)  # asked politely, both stop behind the same step
    stdout, stderr = again.finish()
    summary = json.loads(stdout)
    assert summary["interrupted"] and summary["resumed_from"] % 2 == 0, stderr
    assert 2 <= summary["resumed_from"] <= first and summary["steps"] == steps_done(folder, "killed")
    assert 130 in (again.code(0), again.code(1))  # mlx.launch kills the other when the first has ended

    steps = summary["steps"]
    whole = arguments(folder, "whole", micro_batches=2, steps=400, schedule="constant")
    stop_after(folder, whole, "whole", steps)
    alike(*(results(folder, out) for out in ("killed", "whole")))


def stop_after(folder: Path, words: list[str], out: str, steps: int) -> None:
    """Runs one process and stops it behind a step."""
    from mtp_mlx.cli.train import ProgressListener

    def on_step(listener: Any, report: Any, total: int) -> None:
        if report.step == steps:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ProgressListener, "on_step", on_step)
        assert CliRunner().invoke(main, words).exit_code == 130


def test_two_processes_continue_what_one_began(folder: Path, alone: Run, tmp_path: Path) -> None:
    words = arguments(folder, "began", micro_batches=2)
    stop_after(folder, words, "began", 2)
    words[words.index("--micro-batches") + 1] = "1"
    stdout, stderr = Launched(2, ["cli", *words], tmp_path).finish()
    assert json.loads(stdout)["resumed_from"] == 2, stderr
    alike(results(folder, "began"), alone)
    refused = CliRunner().invoke(main, words)  # one process with one micro-batch is another run
    assert refused.exit_code == 2 and "micro_batches was 2, now 1" in refused.stderr


def test_processes_with_other_data_are_told_so(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "0").mkdir()
    (tmp_path / "1").mkdir()
    lines = (folder / "data.jsonl").read_text().splitlines(keepends=True)
    for rank in (0, 1):
        (tmp_path / str(rank) / "data.jsonl").write_text("".join(lines[rank:]))
    words = arguments(folder, "other", data="RANK")
    stdout, stderr = Launched(2, ["tests.rank_folders", str(tmp_path), *words], tmp_path).finish()
    assert stdout == "" and "the data's fingerprint of process 2 is " in stderr
    assert "start all of them with the same command, model and data" in stderr
    assert not (folder / "other").exists() and not (folder / "other.checkpoint.safetensors").exists()
