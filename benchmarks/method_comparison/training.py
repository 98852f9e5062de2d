"""Trains every contestant; with a budget of seconds, first measures how many steps fit into it."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from statistics import mean
from typing import Any

from rich.console import Console

from method_comparison.contestants import Contestant
from method_comparison.plan import Plan
from mtp_mlx.train.settings import TrainSettings

TIMED_STEPS = 3  # of the short run that measures the time of a step; the first step is not counted


def train(plan: Plan, console: Console) -> None:
    """Trains every contestant to its last step.

    Raises:
        KeyboardInterrupt: the run was stopped, and its state saved.
    """
    for contestant in plan.settings.contestants:
        if plan.steps_of(contestant) is None:
            plan.keep(contestant, _steps_in_time(plan, contestant, console))
        settings = plan.training(contestant, plan.settings.folder(contestant))
        console.rule(f"{contestant.title}, {settings.steps} steps")
        if not _trained(settings, console):
            raise KeyboardInterrupt


def _trained(settings: TrainSettings, console: Console) -> bool:
    """Trains, if it is not trained already; whether it reached its last step.

    Raises:
        MTPError: it was trained, partly or wholly, with other settings, on other data or on another model.
    """
    from mtp_mlx.cli.train import ProgressListener, prepare

    with ProgressListener(console) as listener:
        trainer = prepare(settings, listener)
        trainer.resume()
        if trained_steps(settings.out) == settings.steps == trainer.step:
            return True
        listener.start(trainer.step, settings.steps)
        return trainer.run()


def _steps_in_time(plan: Plan, contestant: Contestant, console: Console) -> int:
    """Number of steps that fit into the budget of seconds, measured in a short run that is thrown away."""
    from mtp_mlx.cli.train import ProgressListener, prepare

    assert plan.settings.seconds is not None
    folder = plan.settings.out / f"timing-{contestant.name}"
    settings = replace(plan.training(contestant, folder, TIMED_STEPS), held_out=0, warmup=0)
    seconds: list[float] = []

    class Timing(ProgressListener):
        def on_step(self, report: Any, total: int) -> None:
            seconds.append(report.seconds)

    with Timing(console) as listener:
        if not prepare(settings, listener).run():
            raise KeyboardInterrupt
    shutil.rmtree(folder)
    for file in folder.parent.glob(f"{folder.name}.*"):
        file.unlink()
    return max(int(plan.settings.seconds / mean(seconds[1:])), 2)


def trained_steps(folder: Path) -> int | None:
    """Number of steps of a finished training; None if there is none."""
    config = folder / "mtp_config.json"
    return json.loads(config.read_text(encoding="utf-8"))["training"]["steps"] if config.exists() else None
