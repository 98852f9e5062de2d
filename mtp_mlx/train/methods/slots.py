"""What the methods that train an adapter of slots alone have in common."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mtp_mlx.errors import MTPError
from mtp_mlx.model.slot_adapter import SlotAdapter
from mtp_mlx.train.data import Example
from mtp_mlx.train.methods.base import Method
from mtp_mlx.train.settings import TrainSettings
from mtp_mlx.train.slot_layout import candidate_anchors


class SlotMethod(Method):
    """A `Method` whose weights are those of one adapter.

    Attributes:
        adapter: what is trained.
    """

    adapter: SlotAdapter

    @classmethod
    def can_train_on(cls, settings: TrainSettings) -> Callable[[Example], bool]:
        """See `Method`: a response of one token has none for a slot to predict."""
        return lambda example: len(candidate_anchors(len(example), example.loss_start)) > 0

    @classmethod
    def too_short(cls, settings: TrainSettings) -> tuple[str, str]:
        """See `Method`."""
        return (
            "slots need responses of two tokens or more",
            "their responses have one token, slots need two",
        )

    @property
    def module(self) -> nn.Module:
        """See `Method`."""
        return self.adapter

    def tensors(self) -> dict[str, mx.array]:
        """See `Method`."""
        return self.adapter.tensors()

    def load_tensors(self, tensors: dict[str, mx.array]) -> None:
        """See `Method`."""
        self.adapter.load_tensors(tensors)


def check_shape(folder: Path, shape: Any, own: Any) -> None:
    """Refuses to start from weights that mean something else here, even where their tensors would fit.

    Args:
        folder: where they are.
        shape, own: the adapter's config there and here; which ids may be drafted and which teacher it had change no
            weight's meaning.

    Raises:
        MTPError: another setting; both values are named.
    """
    there, here = asdict(shape), asdict(own)
    for name in there:
        if name not in ("draft_vocab_size", "teacher") and there[name] != here[name]:
            raise MTPError(
                f"--start-from {folder}: it was trained with {name} {there[name]}, these settings say {here[name]}"
            )


def check_base(folder: Path, info: Any, fingerprint: str) -> None:
    """Refuses to start from the adapter of another base.

    Raises:
        MTPError: `info`, read from `folder`, names another base than `fingerprint`.
    """
    if info.base_fingerprint != fingerprint:
        raise MTPError(
            f"--start-from {folder}: its base has fingerprint {info.base_fingerprint}, this model has {fingerprint}"
        )
