"""What the methods that train an adapter of slots alone have in common."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.cache import RotatingKVCache

from mtp_mlx.drafters.slots.adapter import SlotAdapter
from mtp_mlx.drafters.slots.layout import candidate_anchors
from mtp_mlx.drafters.slots.options import BlockSettings, SlotSettings
from mtp_mlx.drafters.slots.step import BlockChoice
from mtp_mlx.errors import MTPError
from mtp_mlx.model.attach import AttachedModel, attach
from mtp_mlx.model.fingerprint import base_fingerprint
from mtp_mlx.model.seams import cache_leaves, is_recurrent
from mtp_mlx.train.data import Example
from mtp_mlx.train.method import Method, Tell

Settings = TypeVar("Settings", bound=SlotSettings)


class SlotMethod(Method[Settings]):
    """A `Method` that trains an adapter of slots: its weights alone, where a subclass says nothing else.

    Attributes:
        adapter: what is trained.
        vocab_size: of the base.
        what: slots as the method calls them.

    Raises:
        MTPError: the model cannot be attached to or cannot decode with drafts.
    """

    adapter: SlotAdapter
    what: ClassVar[str] = "slots"

    def __init__(self, model: nn.Module, train: Sequence[Example], settings: Settings, tell: Tell) -> None:
        super().__init__(model, train, settings, tell)
        self.fingerprint = base_fingerprint(model)
        self.depth = settings.slots
        bare = attach(model)
        check_slot_caches(bare, train)
        self.vocab_size = bare.vocab_size

    @classmethod
    def can_train_on(cls, settings: Settings) -> Callable[[Example], bool]:
        """See `Method`: a response of one token has none for a slot to predict."""
        return lambda example: len(candidate_anchors(len(example), example.loss_start)) > 0

    @classmethod
    def too_short(cls, settings: Settings) -> tuple[str, str]:
        """See `Method`."""
        return (
            f"{cls.what} need responses of two tokens or more",
            f"their responses have one token, {cls.what} need two",
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


def block_choice(settings: BlockSettings) -> BlockChoice:
    """Which positions carry a block, and how much each depth counts."""
    return BlockChoice(
        slots=settings.slots,
        share=settings.block_share,
        most=settings.max_blocks,
        chunk_blocks=settings.chunk_blocks,
        depth_decay=settings.depth_decay,
    )


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


def check_slot_caches(bare: AttachedModel, examples: Sequence[Example]) -> None:
    """Refuses, before any time is spent, recurrent trunks, and rows that are longer than a sliding window.

    Args:
        bare: the base model; its caches tell how far layers look back.
        examples: the training rows.

    Raises:
        MTPError: recurrent state, a row longer than a layer's window, or a cache that gives no rejected draft back.
    """
    if is_recurrent(bare.make_cache()):
        raise MTPError(
            f"model type '{bare.name}' keeps recurrent state, which the rows of slots would change: train MTP heads "
            "for it (--method mtp-heads)"
        )
    caches = [cache for _, cache in cache_leaves(bare.make_cache())]
    windows = [cache.max_size for cache in caches if isinstance(cache, RotatingKVCache)]
    longest = max(len(example) for example in examples)
    if windows and longest > min(windows):
        raise MTPError(
            f"the longest training row has {longest} tokens, more than this model's sliding window of "
            f"{min(windows)}, past which slots cannot be trained: give --max-length {min(windows)}"
        )
