"""The training settings and the number of steps of each contestant."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from method_comparison.contestants import LOSSY, Contestant
from method_comparison.settings import CompareSettings
from mtp_mlx.drafters.registry import settings_class
from mtp_mlx.errors import MTPError
from mtp_mlx.train.settings import TrainSettings

# Settings that do not affect the decoding measurements.
NOT_MEASURED = ("only", "steps_of", "questions", "question_limit", "tau")


class Plan:
    """How long each contestant trains; saved in a file, so that a stopped run resumes with the same numbers.

    Attributes:
        settings: see `CompareSettings`.

    Raises:
        MTPError: if the plan in the folder was made for another number of seconds.
    """

    def __init__(self, settings: CompareSettings) -> None:
        self.settings, self._path = settings, settings.out / "plan.json"
        self._steps: dict[str, int] = {}
        if self._path.exists():
            plan = json.loads(self._path.read_text(encoding="utf-8"))
            if plan["seconds"] != settings.seconds:
                raise MTPError(
                    f"{self._path} was made for --seconds {plan['seconds']:g}: give the same value, or another --out"
                )
            self._steps = plan["steps"]

    def steps_of(self, contestant: Contestant) -> int | None:
        """The contestant's number of steps; None until it is known how many fit into the time."""
        return self.settings.steps or self._steps.get(contestant.name)

    def keep(self, contestant: Contestant, steps: int) -> None:
        """Save the contestant's number of steps."""
        from mtp_mlx.files import write_text

        self._steps[contestant.name] = steps
        plan = {"seconds": self.settings.seconds, "steps": self._steps}
        write_text(self._path, json.dumps(plan) + "\n")

    def training(self, contestant: Contestant, out: Path, steps: int | None = None) -> TrainSettings:
        """The contestant's training settings."""
        own = self.settings
        total = steps or self.steps_of(contestant)
        assert total is not None
        common: dict[str, Any] = {
            name: getattr(own, name)
            for name in (
                "model", "data", "slots", "rank", "draft_vocab", "batch_size", "micro_batches", "max_length",
                "cut_at_tokens", "learning_rate", "warmup", "held_out", "seed",
            )
        }  # fmt: skip
        if contestant.name != LOSSY:  # regions have their own way to choose positions
            common["block_share"] = own.block_share
        return settings_class(contestant.method)(
            **common | contestant.settings,
            out=out,
            alpha=2.0 * own.rank,
            steps=total,
            schedule="linear",
            measure_every=0,
        )

    def key(self, prompts: Sequence[str]) -> str:
        """A digest of everything that a measurement depends on."""
        values = {k: v for k, v in self.to_json().items() if k not in NOT_MEASURED}
        return hashlib.sha256(json.dumps([values, list(prompts)], sort_keys=True).encode()).hexdigest()[:16]

    def to_json(self) -> dict[str, Any]:
        """The settings as plain values; files by name only, without local folders."""
        values = {
            k: v.name if isinstance(v, Path) else v for k, v in asdict(self.settings).items() if k != "out"
        }
        return {**values, "model": Path(self.settings.model).name, "steps_of": dict(self._steps)}
