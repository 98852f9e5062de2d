"""The seam between the trainer, which owns time and files, and what is trained on which loss."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Generic, TypeVar

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim

from mtp_mlx.errors import MTPError
from mtp_mlx.model.attach import AttachedModel
from mtp_mlx.train.agreement import Agreement
from mtp_mlx.train.data import Example
from mtp_mlx.train.loss import LossParts
from mtp_mlx.train.memory import MemoryEstimate
from mtp_mlx.train.settings import TrainSettings
from mtp_mlx.train.step import MicroBatchRunner

Tell = Callable[[str], None]
Settings = TypeVar("Settings", bound=TrainSettings)


class Method(ABC, Generic[Settings]):
    """Weights to train for a frozen base model, their loss, and the folder they end in.

    Made as `Method(model, train, settings, tell)` of a frozen, bare mlx-lm model, all training examples, and a
    function that tells the user one line. Random numbers of initial weights come from MLX's global state, which
    the trainer has seeded; everything random in a step is a function of (seed, step), so that a resumed run
    repeats it.

    Attributes:
        attached: the base model with what is trained on it.
        fingerprint: of the base.
        depth: the deepest draft that `measure` measures.
    """

    attached: AttachedModel
    fingerprint: str
    depth: int
    _runner: MicroBatchRunner  # of `module`, made by the subclass

    def __init__(self, model: nn.Module, train: Sequence[Example], settings: Settings, tell: Tell) -> None:
        self.settings = settings

    @classmethod
    @abstractmethod
    def can_train_on(cls, settings: Settings) -> Callable[[Example], bool]:
        """Tells whether an example has anything to learn from."""

    @classmethod
    @abstractmethod
    def too_short(cls, settings: Settings) -> tuple[str, str]:
        """Two half sentences: what a usable row must have, and what is the matter with rows left out."""

    @classmethod
    def usable(cls, examples: Sequence[Example], settings: Settings, tell: Tell) -> list[Example]:
        """The examples there is anything to learn from; others are counted to the user.

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

    @property
    def workers(self) -> int:
        """Micro-batches computed side by side: up to two on a CPU, one on a GPU."""
        return min(2, self.settings.micro_batches) if mx.default_device() == mx.Device(mx.cpu) else 1

    @property
    @abstractmethod
    def module(self) -> nn.Module:
        """What is trained: its trainable parameters have gradients and optimizer state."""

    @abstractmethod
    def tensors(self) -> dict[str, mx.array]:
        """Everything a checkpoint must hold to set the trained weights again, by name."""

    @abstractmethod
    def load_tensors(self, tensors: dict[str, mx.array]) -> None:
        """Sets what `tensors` gave.

        Raises:
            MTPError: names missing, unexpected or of another shape.
        """

    def gradients(self, examples: Sequence[Sequence[Example]], step: int) -> tuple[LossParts, dict, int]:
        """Mean loss, mean gradients of `module` and number of supervised rows of a step's micro-batches."""
        return self._runner(examples, step)

    def apply_update(self, optimizer: optim.Optimizer, gradients: dict) -> None:
        """One optimizer step on `module`."""
        optimizer.update(self.module, gradients)

    @abstractmethod
    def measure(self, batches: Sequence[Sequence[Example]]) -> Agreement:
        """Acceptance per depth on batches of held-out examples."""

    @abstractmethod
    def export(self, folder: Path, training: dict[str, Any], acceptance: list[float]) -> None:
        """Writes the adapter folder, whole or not at all.

        Args:
            training: provenance.
            acceptance: as measured last; empty if it was not.

        Raises:
            MTPError: it cannot be written.
        """

    @abstractmethod
    def estimate_memory(self, examples: Sequence[Example]) -> MemoryEstimate:
        """What training on these examples may need."""

    def close(self) -> None:
        """Ends threads; another step starts them again."""
        self._runner.close()
