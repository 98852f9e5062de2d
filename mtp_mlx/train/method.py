"""What a training method provides: weights to train, their loss, and the adapter folder they are written to."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Generic, TypeVar

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim

from mtp_mlx.errors import MTPError
from mtp_mlx.model.attach import AttachedModel
from mtp_mlx.model.base_sample import BaseSample
from mtp_mlx.model.fingerprint import base_fingerprint, sample_base
from mtp_mlx.train.agreement import Agreement
from mtp_mlx.train.data import Example
from mtp_mlx.train.loss import LossParts
from mtp_mlx.train.memory import MemoryEstimate, memory_budget
from mtp_mlx.train.plan import MOST_ROWS_CPU, MOST_ROWS_GPU, StepPlan, fastest_that_fits, on_cpu
from mtp_mlx.train.settings import TrainSettings
from mtp_mlx.train.step import MicroBatchRunner

Tell = Callable[[str], None]
Settings = TypeVar("Settings", bound=TrainSettings)


class Method(ABC, Generic[Settings]):
    """Weights trained for a base model, their loss, and the adapter folder they are written to.

    Initial weights are drawn from MLX's global random state, which the trainer has seeded. Everything random in a
    step is a function of (seed, step), so that a resumed run repeats it.

    Args:
        model: a frozen mlx-lm model, not attached.
        train: all training examples.
        settings: of the run.
        tell: shows the user a line.

    Attributes:
        attached: the base model with the trained weights attached.
        fingerprint, base_sample: of the base model, see `mtp_mlx.model.fingerprint`.
        depth: number of drafts per block that `measure` measures.
        plan: how its steps are cut.

    Raises:
        MTPError: the model or the settings do not allow this training.
    """

    attached: AttachedModel
    fingerprint: str
    base_sample: BaseSample
    depth: int
    plan: StepPlan
    _runner: MicroBatchRunner  # made by the subclass

    def __init__(self, model: nn.Module, train: Sequence[Example], settings: Settings, tell: Tell) -> None:
        self.settings = settings
        self.fingerprint, self.base_sample = base_fingerprint(model), sample_base(model)

    @classmethod
    @abstractmethod
    def can_train_on(cls, settings: Settings) -> Callable[[Example], bool]:
        """A test for examples that have something to train on."""

    @classmethod
    @abstractmethod
    def too_short(cls, settings: Settings) -> tuple[str, str]:
        """Two clauses for messages: what a usable row needs, and why rows are left out."""

    @classmethod
    def usable(cls, examples: Sequence[Example], settings: Settings, tell: Tell) -> list[Example]:
        """The examples that can be trained on; tells how many are left out.

        Raises:
            MTPError: if no example is usable.
        """
        kept = list(filter(cls.can_train_on(settings), examples))
        needs, because = cls.too_short(settings)
        if not kept:
            raise MTPError(f"no training row is long enough: {needs}")
        if len(kept) < len(examples):
            tell(f"{len(examples) - len(kept)} rows left out: {because}")
        return kept

    @classmethod
    def settled(cls, settings: Settings, train: Sequence[Example]) -> Settings:
        """The settings with those that the data decides, a function of both only."""
        return settings

    @classmethod
    def as_read_today(cls, recorded: dict[str, Any]) -> dict[str, Any]:
        """The settings of a checkpoint, as this version would record the same run."""
        return recorded

    @property
    def most_workers(self) -> int:
        """Most micro-batches that it makes sense to compute in parallel: up to two on a CPU, one on a GPU."""
        return min(2, self.settings.micro_batches) if on_cpu() else 1

    @property
    def most_rows(self) -> int:
        """Rows of the largest slices, which keep the device busy."""
        return MOST_ROWS_CPU if on_cpu() else MOST_ROWS_GPU

    def plans(self) -> Iterator[StepPlan]:
        """Possible plans of a step, fastest first."""
        return (StepPlan(workers=count) for count in range(self.most_workers, 0, -1))

    def choose_plan(self, train: Sequence[Example]) -> StepPlan:
        """The fastest plan that fits the memory that training may use.

        Raises:
            MTPError: there is none.
        """
        budget = memory_budget(self.settings.memory)
        return fastest_that_fits(self.plans(), lambda plan: self.estimate_memory(train, plan), budget)

    @property
    @abstractmethod
    def module(self) -> nn.Module:
        """The module whose trainable parameters are trained."""

    @abstractmethod
    def tensors(self) -> dict[str, mx.array]:
        """The tensors of a checkpoint, by name: enough to restore the trained weights."""

    @abstractmethod
    def load_tensors(self, tensors: dict[str, mx.array]) -> None:
        """Restores the weights that `tensors` returned.

        Raises:
            MTPError: a tensor is missing, unexpected or of another shape.
        """

    def gradients(self, examples: Sequence[Sequence[Example]], step: int) -> tuple[LossParts, dict, int]:
        """(mean loss, mean gradients of `module`, number of supervised rows) of a step's micro-batches."""
        return self._runner(examples, step)

    def apply_update(self, optimizer: optim.Optimizer, gradients: dict) -> None:
        """Updates `module` by one optimizer step."""
        optimizer.update(self.module, gradients)

    @abstractmethod
    def measure(self, batches: Sequence[Sequence[Example]]) -> Agreement:
        """Acceptance per depth on batches of held-out examples."""

    @abstractmethod
    def export(self, folder: Path, training: dict[str, Any], acceptance: list[float]) -> None:
        """Writes the adapter folder, whole or not at all.

        Args:
            training: how it was trained, for the folder's config.
            acceptance: per depth, as measured last; empty if it was not.

        Raises:
            MTPError: it cannot be written.
        """

    def about(self, training: dict[str, Any], acceptance: list[float]) -> dict[str, Any]:
        """What the header of the exported folder says of the run and of the base model it was made on.

        Args:
            training, acceptance: as for `export`.
        """
        return {
            "base_sample": self.base_sample,
            "base_recurrent": bool(self.attached.why_linear),
            "training": {**training, "base_precision": self.attached.precision},
            "acceptance": acceptance,
            "acceptance_by_precision": {self.attached.precision: acceptance} if acceptance else {},
        }

    @abstractmethod
    def estimate_memory(self, examples: Sequence[Example], plan: StepPlan) -> MemoryEstimate:
        """Memory that training on these examples needs with a plan."""

    def close(self) -> None:
        """Ends the worker threads; the next step starts new ones."""
        self._runner.close()
