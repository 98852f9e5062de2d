"""What the training methods of slots share."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.cache import RotatingKVCache

from mtp_mlx.adapter_folder import Header, read_header, read_tensors
from mtp_mlx.base_check import compare_fingerprints, compare_samples
from mtp_mlx.drafters.slots.adapter import SlotAdapter
from mtp_mlx.drafters.slots.layout import candidate_anchors
from mtp_mlx.drafters.slots.memory import block_plans, chunk_blocks_of
from mtp_mlx.drafters.slots.options import BlockSettings, SlotSettings
from mtp_mlx.drafters.slots.step import BlockChoice, taught
from mtp_mlx.errors import MTPError
from mtp_mlx.model.attach import AttachedModel, attach
from mtp_mlx.model.seams import cache_leaves
from mtp_mlx.train.data import Example
from mtp_mlx.train.draft_vocabulary import draft_vocabulary, same_draft_ids
from mtp_mlx.train.loss import LossParts
from mtp_mlx.train.method import Method, Tell
from mtp_mlx.train.plan import WHOLE, StepPlan

Settings = TypeVar("Settings", bound=SlotSettings)
Blocks = TypeVar("Blocks", bound=BlockSettings)


class SlotMethod(Method[Settings]):
    """A `Method` that trains an adapter with slots, and, unless a subclass says otherwise, nothing else.

    Attributes:
        adapter: the trained adapter.
        vocab_size: of the base model.
        what: the method's word for slots.

    Raises:
        MTPError: the model cannot be attached to or cannot decode with drafts, or has a sliding window shorter than
            a row.
    """

    adapter: SlotAdapter
    what: ClassVar[str] = "slots"

    def __init__(self, model: nn.Module, train: Sequence[Example], settings: Settings, tell: Tell) -> None:
        super().__init__(model, train, settings, tell)
        self.depth = settings.slots
        bare = attach(model)
        try:
            check_slot_caches(bare, train)
            self.vocab_size = bare.vocab_size
        finally:
            bare.detach()  # before the adapter is attached

    @classmethod
    def can_train_on(cls, settings: Settings) -> Callable[[Example], bool]:
        """See `Method`: a response of one token leaves nothing for a slot to predict."""
        return lambda example: len(candidate_anchors(len(example), taught(example, settings).loss_start)) > 0

    @classmethod
    def too_short(cls, settings: Settings) -> tuple[str, str]:
        """See `Method`."""
        if settings.learn_from == "all":
            return f"{cls.what} need rows of three tokens or more", f"{cls.what} need three tokens"
        return (
            f"{cls.what} need responses of two tokens or more",
            f"their responses have one token, and {cls.what} need two",
        )

    def plans(self) -> Iterator[StepPlan]:
        """See `Method`."""
        return block_plans(self.settings, self.most_workers, self.most_rows)

    def draft_vocabulary(self, examples: Sequence[Example]) -> mx.array | None:
        """The ids most used in what is learnt from, as many as the settings say; None for all."""
        learnt = [taught(example, self.settings) for example in examples]
        return draft_vocabulary(learnt, self.settings.draft_vocab or 0, self.vocab_size)

    def gradients(self, examples: Sequence[Sequence[Example]], step: int) -> tuple[LossParts, dict, int]:
        """See `Method`."""
        learnt = [[taught(example, self.settings) for example in batch] for batch in examples]
        return super().gradients(learnt, step)

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

    def start_from(self, folder: Path, config_of: Callable[[Path, Header], Any], tell: Tell) -> None:
        """Sets the weights to those of another adapter of the same shape and base model.

        Args:
            folder: its adapter folder.
            config_of: reads the adapter's config from the folder's header.
            tell: shows the user a line.

        Raises:
            MTPError: no such adapter there, or one of another base model or another shape.
        """
        header = read_header(folder)
        shape = config_of(folder, header)
        compare_fingerprints(f"`start_from` {folder}", header, self.fingerprint)
        compare_samples(f"`start_from` {folder}", header, self.base_sample)
        check_shape(folder, shape, self.adapter.config)
        tensors = read_tensors(folder)
        if not same_draft_ids(self.adapter.tensors().get("draft_ids"), tensors.get("draft_ids")):
            tell(f"{folder} was trained with another draft vocabulary; that of this data is used")
        self.adapter.load_tensors(tensors)


SLOTS_PER_STEP = 4096  # by default; neighbouring positions of a long text teach much the same


def settled_share(settings: Blocks, train: Sequence[Example]) -> Blocks:
    """The settings with a `block_share`: by default about `SLOTS_PER_STEP` slots a step, if there are as many."""
    if settings.block_share is not None:
        return settings
    learnt = [taught(example, settings) for example in train]
    positions = [len(candidate_anchors(len(example), example.loss_start)) for example in learnt]
    slots = block_choice(settings).mean_slots
    a_step = slots * settings.batch_size * settings.micro_batches * sum(positions) / len(positions)
    return replace(settings, block_share=min(1.0, float(f"{SLOTS_PER_STEP / a_step:.3g}")))


def block_choice(settings: BlockSettings, plan: StepPlan = WHOLE) -> BlockChoice:
    """Which positions have a block of slots, and the loss weight of each slot."""
    return BlockChoice(
        slots=settings.slots,
        share=1.0 if settings.block_share is None else settings.block_share,
        most=settings.max_blocks,
        chunk_blocks=chunk_blocks_of(settings.chunk_blocks, settings.slots, plan),
        depth_decay=settings.depth_decay,
        lengths=settings.block_lengths,
    )


def check_shape(folder: Path, shape: Any, own: Any) -> None:
    """Refuses to start from an adapter of another shape, whose weights mean something else even if they fit.

    The draft vocabulary and the teacher's sampling may differ: no weight depends on them.

    Args:
        folder: the adapter folder.
        shape: its adapter's config.
        own: config of the adapter to train.

    Raises:
        MTPError: a setting differs; the message has both values.
    """
    there, here = asdict(shape), asdict(own)
    for name in there:
        if name not in ("draft_vocab_size", "teacher") and there[name] != here[name]:
            raise MTPError(
                f"`start_from` {folder}: it was trained with {name} {there[name]}, these settings say {here[name]}"
            )


def check_slot_caches(bare: AttachedModel, examples: Sequence[Example]) -> None:
    """Refuses models on which slots cannot be trained, before any time is spent.

    Args:
        bare: the base model; its caches tell how far its layers look back.
        examples: the training rows.

    Raises:
        MTPError: a row is longer than a layer's sliding window, or a cache cannot take rejected drafts back.
    """
    caches = [cache for _, cache in cache_leaves(bare.make_cache())]
    windows = [cache.max_size for cache in caches if isinstance(cache, RotatingKVCache)]
    longest = max(len(example) for example in examples)
    if windows and longest > min(windows):
        raise MTPError(
            f"the longest training row has {longest} tokens, more than this model's sliding window of "
            f"{min(windows)}, beyond which slots cannot be trained: set `max_length` to {min(windows)}"
        )
