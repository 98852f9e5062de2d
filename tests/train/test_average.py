"""Proves that the average of the weights is what is measured and exported, and that runs with one resume exactly."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from mtp_mlx.adapter_folder import read_header
from mtp_mlx.errors import MTPError
from mtp_mlx.train import checkpoint as checkpoints
from mtp_mlx.train.average import WeightAverage
from mtp_mlx.train.trainer import StepReport, Trainer
from tests.train.training import Remembering, metrics, same, settings_for, trainer_for, weights

METHODS = ["mask-tokens", "ptp", "mtp-heads"]


class Watching(Remembering):
    """Keeps the trained weights after every step, and averages them in numpy."""

    def __init__(self, decay: float) -> None:
        super().__init__()
        self.trainer: Trainer | None = None
        self.decay = decay
        self.average: dict[str, np.ndarray] = {}

    def watch(self, trainer: Trainer) -> None:
        self.trainer, self.average = trainer, weights(trainer)

    def on_step(self, report: StepReport, total: int) -> None:
        super().on_step(report, total)
        assert self.trainer is not None
        keep = min(self.decay, report.step / (report.step + 9))  # 1 / 10 after the first step
        for name, value in trained(weights(self.trainer)).items():
            self.average[name] = keep * self.average[name] + (1 - keep) * value


def watched_run(out: Path, method: str, ema: float, **changes: Any) -> tuple[Trainer, Watching]:
    listener = Watching(ema)
    trainer = trainer_for(out, listener, method=method, ema=ema, **changes)
    listener.watch(trainer)
    assert trainer.run()
    return trainer, listener


def trained(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {name: value for name, value in tensors.items() if name != "draft_ids"}


def close_to(found: dict[str, Any], expected: dict[str, np.ndarray], tolerance: float) -> bool:
    return found.keys() == expected.keys() and all(
        np.allclose(np.array(found[name].astype(mx.float32)), expected[name], rtol=tolerance, atol=1e-5)
        for name in expected
    )


@pytest.mark.parametrize("method", METHODS)
def test_the_exported_adapter_has_the_averaged_weights(tmp_path: Path, method: str) -> None:
    """The average is another than the last weights, and leaves every step as it is without one."""
    trainer, listener = watched_run(tmp_path / "a", method, 0.7)
    exported = dict(mx.load(str(tmp_path / "a" / "mtp.safetensors")))
    del exported["draft_ids"]
    assert close_to(exported, trained(listener.average), 0.01)  # stored in bfloat16
    assert not close_to(exported, trained(weights(trainer)), 0.01)
    assert read_header(tmp_path / "a").training["ema"] == 0.7
    plain, _ = watched_run(tmp_path / "b", method, 0.0)
    assert same(weights(trainer), weights(plain))
    losses = [[row["loss"] for row in metrics(tmp_path / name) if "loss" in row] for name in ("a", "b")]
    assert losses[0] == losses[1]


def test_the_averaged_weights_are_measured(tmp_path: Path) -> None:
    seen: list[dict[str, np.ndarray]] = []
    listener = Watching(0.7)
    trainer = trainer_for(tmp_path / "a", listener, ema=0.7)
    listener.watch(trainer)
    measure = trainer.method.measure

    def measured(batches: Any) -> Any:
        now = weights(trainer)
        expected = {name: listener.average.get(name, now[name]) for name in now}
        seen.append(now)
        assert all(np.allclose(now[name], expected[name], rtol=1e-5, atol=1e-6) for name in now)
        return measure(batches)

    trainer.method.measure = measured  # type: ignore[method-assign]
    assert trainer.run()
    assert len(seen) == 3 and not same(seen[-1], weights(trainer))


@pytest.mark.parametrize("method", ["mask-tokens", "mtp-heads"])
def test_a_stopped_run_goes_on_to_the_same_average(tmp_path: Path, method: str) -> None:
    """The checkpoint holds both, bit for bit; stopped between two checkpoints, the steps after the last run again."""
    watched_run(tmp_path / "whole", method, 0.9)
    stopped = trainer_for(tmp_path / "stopped", method=method, ema=0.9)
    for _ in range(6):
        stopped._one_step()
    stopped.save()
    stopped._one_step()
    trainer = trainer_for(tmp_path / "stopped", method=method, ema=0.9)
    assert trainer.resume() and trainer.step == 6 and trainer.run()
    for ending in (".checkpoint.safetensors", "/mtp.safetensors"):
        whole, found = (dict(mx.load(f"{tmp_path / name}{ending}")) for name in ("whole", "stopped"))
        assert whole.keys() == found.keys() and all(
            mx.array_equal(whole[name], found[name]) for name in whole
        )
    names = dict(mx.load(str(tmp_path / "whole.checkpoint.safetensors")))
    of_adapter = [name.removeprefix("adapter/") for name in names if name.startswith("adapter/")]
    assert all(f"average/{name}" in names for name in of_adapter if name != "draft_ids")


def test_a_checkpoint_without_an_average_starts_one_at_its_weights(tmp_path: Path) -> None:
    """As it is written by versions that did not average."""
    old = trainer_for(tmp_path / "a")
    old._one_step()
    old.save()
    state = checkpoints.load_checkpoint(old.checkpoint_path)
    trainer = trainer_for(tmp_path / "b", ema=0.9)
    checkpoints.restore(state, trainer.method, trainer._optimizer, trainer._average)
    found = {name: np.array(value) for name, value in trainer._average.tensors().items()}
    assert same(found, trained(weights(old)))


def test_an_average_of_half_precision_is_kept_in_float32() -> None:
    """Steps below the rounding of the weights count."""
    layer = nn.Linear(4, 4)
    layer.set_dtype(mx.bfloat16)
    layer.weight = mx.full((4, 4), 1.0, dtype=mx.bfloat16)
    average = WeightAverage(layer, 0.999)
    layer.weight = mx.full((4, 4), 1.0078125, dtype=mx.bfloat16)  # the next one
    for step in range(9000, 9010):
        average.update(step)
    value = average.tensors()["weight"]
    assert value.dtype == mx.float32 and 1.0 < float(mx.max(value)) < 1.001
    with average.in_place():
        assert layer.weight.dtype == mx.bfloat16 and float(mx.max(layer.weight)) == 1.0
    assert float(mx.max(layer.weight)) == 1.0078125


def test_a_damaged_average_is_refused() -> None:
    average = WeightAverage(nn.Linear(2, 2), 0.5)
    with pytest.raises(MTPError, match="averaged weights lack"):
        average.load_tensors({"weight": mx.zeros((2, 2))})


def test_a_decay_of_one_is_refused(tmp_path: Path) -> None:
    with pytest.raises(MTPError, match="`ema` 1 keeps the initial weights"):
        settings_for(tmp_path / "a", ema=1.0)
