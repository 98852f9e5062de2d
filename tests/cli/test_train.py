"""Proves that `mtp-mlx train` trains, resumes and reports, and that what a person can mend is one sentence."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from mtp_mlx.adapter_folder import read_header
from mtp_mlx.cli import main
from mtp_mlx.train.trainer import Trainer
from tests.tiny import save_tiny

SHARED = {
    "steps": 6,
    "warmup": 2,
    "draft_vocab": 60,
    "measure_every": 3,
    "save_every": 2,
    "held_out": 4,
}
SMALL = {**SHARED, "slots": 2, "rank": 3, "sampler_width": 16}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("model"), "qwen3", seed=3)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    rows = [
        {"prompt": f"print({n})", "response": "the fox and the dog " * (1 + n % 3), "finished": n % 2 == 0}
        for n in range(16)
    ]
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def arguments(model: Path | str, data: Path, out: Path, **changes: Any) -> list[str]:
    values = {**SMALL, "model": model, "data": data, "out": out, **changes}
    pairs = ((f"--{name.replace('_', '-')}", str(value)) for name, value in values.items())
    return ["train", *(part for pair in pairs for part in pair)]


def run(*args: str) -> Result:
    return CliRunner().invoke(main, list(args))


def test_it_trains_and_goes_on(model: Path, data: Path, tmp_path: Path) -> None:
    out = tmp_path / "adapter"
    result = run(*arguments(model, data, out), "--json")
    assert result.exit_code == 0, result.output
    summary = json.loads(result.stdout)
    assert summary["steps"] == 6 and summary["resumed_from"] is None and summary["interrupted"] is False
    assert len(summary["acceptance"]) == 2 and summary["tokens_per_step"] >= 1 and summary["loss"] > 0
    for text in (
        "data: 16 rows, ", "; 4 held out", "memory, estimated: ", "step 3: acceptance by depth", "6 steps, loss "
    ):  # fmt: skip
        assert text in result.stderr, text
    assert read_header(out).training["steps"] == 6
    again = run(*arguments(model, data, out), "--json")
    assert again.exit_code == 0 and "resuming after step 6 from " in again.stderr
    assert json.loads(again.stdout)["resumed_from"] == 6
    assert json.loads(again.stdout)["acceptance"] == summary["acceptance"]


def test_it_trains_heads_and_extends_them(model: Path, data: Path, tmp_path: Path) -> None:
    def train(out: str, **changes: Any) -> Result:
        shared = {
            "model": model,
            "data": data,
            "out": tmp_path / out,
            **SHARED,
            **changes,
        }
        pairs = ((f"--{name.replace('_', '-')}", str(value)) for name, value in shared.items())
        return run("train", "mtp-heads", *(part for pair in pairs for part in pair), "--json")

    states = tmp_path / "states"
    first = train("two", heads=2, hidden_cache=states)
    assert first.exit_code == 0, first.output
    assert "hidden states are cached in" in first.stderr and "0 of 12 rows are there" in first.stderr
    assert "memory, estimated: " in first.stderr and "step 3: acceptance by depth" in first.stderr
    summary = json.loads(first.stdout)
    assert len(summary["acceptance"]) == 2 and summary["loss"] > 0
    again = train("two", heads=2, hidden_cache=states)
    assert json.loads(again.stdout)["resumed_from"] == 6 and "12 of 12 rows are there" in again.stderr
    second = train("four", start_from=tmp_path / "two", extend="2x", hidden_cache=states)
    assert second.exit_code == 0, second.output
    assert len(json.loads(second.stdout)["acceptance"]) == 4 and "2 copies are trained" in second.stderr
    check_sentence(train("x", objective="apple"), "--objective is a setting of mask-tokens, not of mtp-heads")
    check_sentence(
        train("x", start_from=tmp_path / "two", extend="lots"), "2x or a number of heads, not 'lots'"
    )
    check_sentence(train("x", heads=3, start_from=tmp_path / "two"), "two has 2 heads, and --heads is 3")
    assert not (tmp_path / "x").exists()


def test_yaml_and_options_are_the_same_settings(model: Path, data: Path, tmp_path: Path) -> None:
    config = tmp_path / "train.yaml"
    values = {**SMALL, "model": str(model), "data": str(data), "out": str(tmp_path / "a"), "steps": 99}
    config.write_text("".join(f"{name}: {value}\n" for name, value in values.items()))
    first = run("train", "--config", str(config), "--steps", "6", "--json")
    second = run(*arguments(model, data, tmp_path / "b"), "--json")
    assert first.exit_code == second.exit_code == 0, first.output
    assert json.loads(first.stdout)["loss"] == json.loads(second.stdout)["loss"]


def test_answers_cut_at_a_length(
    model: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """0 means none; any other number reaches the data reader."""
    seen = []
    import mtp_mlx.train.data as module

    original = module.load_splits
    monkeypatch.setattr(
        module, "load_splits", lambda *a, **k: seen.append(k["cut_at_tokens"]) or original(*a, **k)
    )
    for cut in (0, 12):
        assert run(*arguments(model, data, tmp_path / str(cut), cut_at_tokens=cut, steps=2)).exit_code == 0
    assert seen == [None, 12]


def test_a_run_that_cannot_fit_is_refused_at_once(model: Path, data: Path, tmp_path: Path) -> None:
    result = run(*arguments(model, data, tmp_path / "adapter", steps=2, memory="90MB"))
    assert (
        result.exit_code == 2 and "even in the smallest slices, and --memory allows 90.0 MB" in result.stderr
    )
    result = run(*arguments(model, data, tmp_path / "adapter", steps=2, memory="1kB"))
    assert result.exit_code == 2 and "its weights alone take" in result.stderr
    assert not list(tmp_path.glob("adapter*"))


def test_the_plan_and_its_memory_are_told(model: Path, data: Path, tmp_path: Path) -> None:
    result = run(*arguments(model, data, tmp_path / "adapter", steps=5))
    assert result.exit_code == 0
    for words in ("steps: slices of up to 256 rows", "memory, estimated: ", "left, at ", "of memory so far"):
        assert words in result.stderr, words


def test_an_interruption_is_130(
    model: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = Trainer._one_step

    def step_and_interrupt(self: Trainer) -> None:
        original(self)
        if self.step == 3:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(Trainer, "_one_step", step_and_interrupt)
    result = run(*arguments(model, data, tmp_path / "adapter"), "--json")
    assert result.exit_code == 130, result.output
    assert json.loads(result.stdout)["interrupted"] and json.loads(result.stdout)["steps"] == 3
    assert "Stopped: the same command resumes from here." in result.stderr
    monkeypatch.undo()
    finished = run(*arguments(model, data, tmp_path / "adapter"), "--json")
    assert finished.exit_code == 0 and json.loads(finished.stdout)["resumed_from"] == 3


def test_the_real_command_saves_on_ctrl_c(model: Path, data: Path, tmp_path: Path) -> None:
    """A process of its own, with OpenBLAS preloaded as the console script does."""
    out = tmp_path / "adapter"
    code = "from mtp_mlx.cli import main; main()"
    command = [sys.executable, "-c", code, *arguments(model, data, out, steps=100_000, measure_every=0)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    metrics = tmp_path / "adapter.metrics.jsonl"
    deadline = time.monotonic() + 60
    while not (metrics.exists() and metrics.read_text().count("\n") > 3) and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert "stopped after step" in errors and "Traceback" not in errors
    assert (tmp_path / "adapter.checkpoint.safetensors").exists() and read_header(out).training["steps"] > 3


SLOW_STEP = """
import mlx.core as mx
from mtp_mlx.train.trainer import Trainer

original = Trainer._one_step

def slow(self):
    original(self)
    if self.step == 2:
        print("slow", flush=True)
        value = mx.ones((3000, 3000))
        for _ in range(400):
            value = value @ value / 3000
        mx.eval(value)

Trainer._one_step = slow
from mtp_mlx.cli import main
main()
"""


def test_the_second_ctrl_c_ends_a_slow_step_at_once(model: Path, data: Path, tmp_path: Path) -> None:
    """Inside one call of MLX, which takes more than ten seconds; the first press is answered at once too."""
    out = tmp_path / "adapter"
    command = [sys.executable, "-c", SLOW_STEP, *arguments(model, data, out, steps=100, measure_every=0)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, text=True, bufsize=1, **pipes) as process:
        assert process.stdout is not None and process.stderr is not None
        assert process.stdout.readline() == "slow\n"
        time.sleep(0.3)
        started = time.monotonic()
        process.send_signal(signal.SIGINT)
        while (line := process.stderr.readline()) and "stopping after this step" not in line:
            pass
        assert line and time.monotonic() - started < 2
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=60) == 130 and time.monotonic() - started < 4
        rest = process.stderr.read()
    assert "Stopped without saving" in rest and "Traceback" not in rest
    assert not list(tmp_path.glob("*.safetensors")) and not out.exists()


def check_sentence(result: Result, *texts: str) -> None:
    """Exit code 2 and one sentence, on stderr, without a traceback."""
    assert result.exit_code == 2, result.output
    assert result.stdout == "" and "Traceback" not in result.stderr
    lines = [line for line in result.stderr.splitlines() if line.startswith("Error: ")]
    assert len(lines) == 1 and result.stderr.rstrip().endswith(lines[0]), result.stderr
    for text in texts:
        assert text in lines[0], lines[0]


def test_mendable_errors(model: Path, data: Path, tmp_path: Path) -> None:
    out = tmp_path / "adapter"
    config = tmp_path / "bad.yaml"
    config.write_text("learning_rte: 0.1\n")
    check_sentence(
        run("train", "--config", str(config)), "bad.yaml", "'learning_rte'", "Did you mean 'learning_rate'?"
    )
    check_sentence(run(*arguments(tmp_path / "none", data, out)), f"no model '{tmp_path / 'none'}'")
    check_sentence(run(*arguments(model, tmp_path / "no.jsonl", out)), "no.jsonl: cannot be read")
    check_sentence(
        run(*arguments(model, data, out, warmup=7)), "--warmup (7) is longer than the run (--steps 6)"
    )
    check_sentence(
        run(*arguments(model, data, out, held_out=16)), "--held-out is 16, and the data has 16 rows"
    )
    check_sentence(run(*arguments(model, data, out, target_modules="query")), "['query'] are not linear")
    check_sentence(run(*arguments(model, data, tmp_path)), f"{tmp_path} is a folder with other files")
    check_sentence(run(*arguments(model, data, out, start_from=tmp_path)), "is not an adapter folder")
    data.write_text(data.read_text()[:-20])
    check_sentence(run(*arguments(model, data, out)), "data.jsonl, line 16: truncated")
    check_sentence(run("train", "--model", str(model), "--data", str(data)), "--out is missing")
    assert not out.exists()


def test_a_checkpoint_of_other_settings(model: Path, data: Path, tmp_path: Path) -> None:
    out = tmp_path / "adapter"
    assert run(*arguments(model, data, out, steps=2)).exit_code == 0
    result = run(*arguments(model, data, out, rank=4))
    check_sentence(
        result, "belongs to another run", "rank was 3, now 4", "steps was 2, now 6", "another --out"
    )


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full, a device that is always full")
def test_a_full_disk(model: Path, data: Path, tmp_path: Path) -> None:
    """The metrics file leads to a device on which every write fails."""
    (tmp_path / "adapter.metrics.jsonl").symlink_to("/dev/full")
    (tmp_path / "adapter").mkdir()
    original = Trainer.resume
    try:
        Trainer.resume = lambda self: False  # type: ignore[method-assign]
        check_sentence(
            run(*arguments(model, data, tmp_path / "adapter")), "the disk is full: ", "metrics.jsonl"
        )
    finally:
        Trainer.resume = original  # type: ignore[method-assign]


def test_the_verb_loads_no_mlx() -> None:
    """OpenBLAS must be loaded before mlx, which happens after the verb's module is imported."""
    code = "import sys, mtp_mlx.cli.train; print([n for n in ('mlx', 'mlx_lm', 'numpy') if n in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
