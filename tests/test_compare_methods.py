"""`benchmarks/compare_methods.py` on a tiny model: trains all five, measures, writes, goes on after a stop."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

import compare_methods
from method_comparison.contestants import CONTESTANTS
from method_comparison.training import TIMED_STEPS
from mtp_mlx.adapter_folder import read_header
from mtp_mlx.errors import MTPError
from mtp_mlx.train.trainer import Trainer
from tests.tiny import save_tiny

NAMES = ["independent", "o-ptp", "c-ptp", "self-distil", "conf-adapt"]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("compare")
    save_tiny(root / "model", "llama", seed=3)
    rows = [{"prompt": f"add {i} and {i + 1}", "completion": f"The sum is {2 * i + 1}."} for i in range(8)]
    (root / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (root / "prompts.jsonl").write_text('{"prompt": "The sky"}\n{"prompt": "add 2 and 3"}\n')
    (root / "questions.jsonl").write_text('{"question": "add 2 and 3", "answer": "#### 5"}\n')
    return root


def run(inputs: Path, out: Path, *more: str) -> Result:
    options = {
        "--model": inputs / "model", "--data": inputs / "data.jsonl", "--prompts": inputs / "prompts.jsonl",
        "--questions": inputs / "questions.jsonl", "--out": out, "--slots": 2, "--rank": 2, "--batch-size": 1,
        "--micro-batches": 1, "--draft-vocab": 0, "--held-out": 2, "--max-tokens": 8,
    }  # fmt: skip
    arguments = [str(part) for pair in options.items() for part in pair]
    return CliRunner().invoke(compare_methods.main, [*arguments, "--tau", "0.01", "--tau", "1", *more])


def test_trains_measures_and_goes_on(inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    original, calls = Trainer.run, 0

    def stopped(self: Trainer) -> bool:
        nonlocal calls
        calls += 1
        return original(self) and calls != 3

    monkeypatch.setattr(Trainer, "run", stopped)
    assert run(inputs, out, "--steps", "2").exit_code == 130
    assert calls == 3 and not (out / "table.md").exists()
    result = run(inputs, out, "--steps", "2")
    assert result.exit_code == 0, result.output
    assert calls == 5, "what is trained is not trained again"
    table = (out / "table.md").read_text()
    assert table.strip() == result.stdout.strip()
    assert all(one.title in table for one in CONTESTANTS)
    report = json.loads((out / "results.json").read_text())
    assert [row["name"] for row in report["results"]] == NAMES
    for row in report["results"]:
        assert row["steps"] == 2 and row["seconds"] >= 0 and len(row["held_out"]) == 2
        for temperature in ("at 0", "at 0.7"):
            own = row[temperature]
            assert own["same_text"] == own["prompts"] == 2, "verified drafts leave the text as it is"
            assert 1 <= own["tokens_per_step"] <= 3 and len(own["acceptance"]) == 2
    methods = [read_header(out / name) for name in NAMES]
    assert [m.training["method"] for m in methods] == ["ptp", "ptp", "ptp", "mask-tokens", "conf-adapt"]
    assert [m.own["adapter"].get("independent") for m in methods[:3]] == [True, False, False]
    assert len({m.training["data_fingerprint"] for m in methods}) == 1
    assert [(row["tau"], row["lossless"]) for row in report["tau"]] == [
        (None, True),
        (1.0, False),
        (0.01, False),
    ]
    assert (out / "tau.svg").read_text().startswith("<svg") and str(tmp_path) not in json.dumps(report)

    measured = (out / "measured.jsonl").read_text()
    assert len(measured.splitlines()) == 2 * (3 + 2 * len(NAMES))
    assert run(inputs, out, "--steps", "2").exit_code == 0
    assert calls == 5 and (out / "measured.jsonl").read_text() == measured, "nothing is done twice"
    other = run(inputs, out, "--steps", "2", "--seed", "3")
    assert isinstance(other.exception, MTPError)


def test_equal_time_is_planned_once(inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A short run says how many steps fit; the number is written down and the short run is thrown away."""
    out, trained = tmp_path / "out", []
    original = Trainer.run

    def remembered(self: Trainer) -> bool:
        trained.append(self.settings.steps)
        if self.settings.steps > TIMED_STEPS:
            raise KeyboardInterrupt  # the real run is not this test's business
        return original(self)

    monkeypatch.setattr(Trainer, "run", remembered)
    options = ("--seconds", "30", "--only", "c-ptp")
    assert run(inputs, out, *options).exit_code == 130
    (planned,) = json.loads((out / "plan.json").read_text())["steps"].values()
    assert trained == [TIMED_STEPS, planned] and planned > TIMED_STEPS
    assert not list(out.glob("timing*"))
    assert run(inputs, out, *options).exit_code == 130 and trained == [TIMED_STEPS, planned, planned]
    other = run(inputs, out, "--seconds", "60", "--only", "c-ptp")
    assert isinstance(other.exception, MTPError) and "--seconds 30" in str(other.exception)


def test_what_was_trained_otherwise_is_refused(inputs: Path, tmp_path: Path) -> None:
    options = ("--steps", "2", "--only", "o-ptp")
    assert run(inputs, tmp_path / "out", *options).exit_code == 0
    (tmp_path / "out" / "measured.jsonl").unlink()  # stopped before anything was measured
    other = run(inputs, tmp_path / "out", *options, "--learning-rate", "0.02")
    assert isinstance(other.exception, MTPError) and "learning_rate" in str(other.exception)
    (inputs / "data.jsonl").rename(tmp_path / "kept.jsonl")
    (inputs / "data.jsonl").write_text((tmp_path / "kept.jsonl").read_text().replace("sum", "total"))
    other = run(inputs, tmp_path / "out", *options)
    (tmp_path / "kept.jsonl").rename(inputs / "data.jsonl")
    assert isinstance(other.exception, MTPError) and "data" in str(other.exception)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ((), "give --steps or --seconds"),
        (("--steps", "2", "--seconds", "9"), "give --steps or --seconds"),
        (("--steps", "2", "--only", "ptp"), "unknown contestant 'ptp'"),
    ],
)
def test_refuses(inputs: Path, tmp_path: Path, more: tuple[str, ...], message: str) -> None:
    result = run(inputs, tmp_path / "out", *more)
    assert isinstance(result.exception, MTPError) and message in str(result.exception)
    assert not (tmp_path / "out").exists()
