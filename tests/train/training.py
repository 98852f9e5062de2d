"""Tiny training runs: examples, settings, a listener that remembers, and a script for runs that get killed.

As a script: `python -m tests.train.training OUT SLEEP [METHOD]` trains as the tests do, prints "step N" after each
step and sleeps SLEEP seconds then.
"""

from __future__ import annotations

import json
import random
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from mtp_mlx.drafters.registry import method_class, settings_class
from mtp_mlx.train.agreement import Agreement
from mtp_mlx.train.data import Example
from mtp_mlx.train.settings import TrainSettings
from mtp_mlx.train.trainer import StepReport, Trainer
from tests.tiny import VOCABULARY, tiny_model


def examples(count: int = 14, seed: int = 0) -> list[Example]:
    """Texts with a pattern that can be learnt: three tokens of four repeat."""
    rng = random.Random(seed)
    rows = []
    for _ in range(count):
        motif = [rng.randrange(3, VOCABULARY) for _ in range(4)]
        rows.append(Example((motif * 8)[: rng.randrange(9, 22)], rng.randrange(1, 5)))
    return rows


OF_METHOD: dict[str, dict[str, Any]] = {
    "mask-tokens": {"slots": 3, "rank": 4, "alpha": 8.0, "sampler_width": 16, "chunk_blocks": 4},
    "ptp": {"slots": 3, "rank": 4, "alpha": 8.0, "chunk_blocks": 4},
    "conf-adapt": {"slots": 3, "rank": 4, "alpha": 8.0},
    "mtp-heads": {"heads": 3, "top_share": 0.2, "loss_rows": 32},
}


def settings_for(out: Path, method: str = "mask-tokens", **changes: Any) -> Any:
    """Twelve steps with two workers, a measurement every fourth and a checkpoint every third."""
    values: dict[str, Any] = {
        "data": out.with_name("data.jsonl"),
        "out": out,
        "steps": 12,
        "warmup": 3,
        "draft_vocab": 60,
        "measure_every": 4,
        "save_every": 3,
    }
    return settings_class(method)(**{**values, **OF_METHOD[method], **changes})


class Remembering:
    """A listener that keeps what it is told."""

    def __init__(self) -> None:
        self.steps: list[StepReport] = []
        self.measured: list[int] = []
        self.messages: list[str] = []

    def on_step(self, report: StepReport, total: int) -> None:
        self.steps.append(report)

    def on_measurement(self, step: int, agreement: Agreement) -> None:
        self.measured.append(step)

    def on_message(self, message: str) -> None:
        self.messages.append(message)


def make_trainer(
    model: Any, train: list[Example], held_out: list[Example], settings: TrainSettings, listener: Any
) -> Trainer:
    """A trainer by the method that the settings belong to."""
    return Trainer(method_class(settings.method), model, train, held_out, settings, listener)


def trainer_for(out: Path, listener: Any = None, model: Any = None, **changes: Any) -> Trainer:
    """A trainer of a tiny qwen3, not yet resumed."""
    rows = examples()
    model = tiny_model("qwen3", seed=3) if model is None else model
    return make_trainer(model, rows[:10], rows[10:], settings_for(out, **changes), listener or Remembering())


def metrics(out: Path) -> list[dict[str, Any]]:
    """The lines of the metrics file, without times."""
    lines = out.with_name(out.name + ".metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    return [{key: value for key, value in row.items() if key != "seconds"} for row in rows]


def weights(trainer: Trainer) -> dict[str, np.ndarray]:
    """What is trained, as it is now."""
    return {name: np.array(value) for name, value in trainer.method.tensors().items()}


def same(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> bool:
    """Whether these are the same tensors, bit for bit."""
    return one.keys() == other.keys() and all(np.array_equal(one[name], other[name]) for name in one)


class _Printing(Remembering):
    def __init__(self, pause: float) -> None:
        super().__init__()
        self._pause = pause

    def on_step(self, report: StepReport, total: int) -> None:
        print("step", report.step, flush=True)
        time.sleep(self._pause)

    def on_message(self, message: str) -> None:
        print(message, flush=True)


if __name__ == "__main__":
    out, pause = Path(sys.argv[1]), float(sys.argv[2])
    trainer = trainer_for(out, _Printing(pause), method=(*sys.argv[3:], "mask-tokens")[0])
    trainer.resume()
    sys.exit(0 if trainer.run() else 130)
