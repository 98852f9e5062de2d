"""Which positions of a text carry a block of slots in a training step, and the columns that drafts are scored on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from mtp_mlx.drafters.slots.adapter import adapter_of
from mtp_mlx.drafters.slots.layout import SlotLayout, build_layout, candidate_anchors
from mtp_mlx.drafters.slots.two_pass import prefix_pass, slot_pass
from mtp_mlx.model.attach import AttachedModel
from mtp_mlx.train.data import Example


@dataclass(frozen=True)
class BlockChoice:
    """Which positions carry a block in a step.

    Attributes:
        slots: k slots per block.
        share: share of the candidate positions used, (0, 1].
        most: at most this many blocks per sequence, 0 = no limit.
        chunk_blocks: blocks that share a copy of the prefix.
        depth_decay: weight of depth j is depth_decay ** (j - 1).
    """

    slots: int = 4
    share: float = 1.0
    most: int = 0
    chunk_blocks: int = 16
    depth_decay: float = 1.0

    def layout(self, examples: Sequence[Example], seed: int, step: int, lead: int = 0) -> SlotLayout:
        """The step's layout; positions are drawn from (seed, step) alone, so a resumed run repeats them.

        `lead` as in `build_layout`.
        """
        random = np.random.default_rng((seed, step))
        anchors = []
        for example in examples:
            candidates = candidate_anchors(len(example), example.loss_start)
            count = int(np.ceil(self.share * len(candidates)))
            count = min(count, self.most) if self.most else count
            anchors.append(np.sort(random.permutation(candidates)[:count]))
        return build_layout(
            [example.tokens for example in examples], anchors, self.slots, self.chunk_blocks, lead
        )


def draft_columns(attached: AttachedModel) -> np.ndarray:
    """[V] column of the draft head of every id, -1 for ids that cannot be drafted."""
    ids = attached.draft_ids
    if ids is None:
        return np.arange(attached.vocab_size, dtype=np.int32)
    columns = np.full(attached.vocab_size, -1, dtype=np.int32)
    columns[np.array(ids)] = np.arange(len(ids), dtype=np.int32)
    return columns


def evaluate_constants(attached: AttachedModel) -> None:
    """Evaluates every array the passes read: a lazy one belongs to the thread that made it."""
    layout = build_layout([[0, 0, 0]], [np.array([0], dtype=np.int32)], slots=1, chunk_blocks=1)
    prefix = prefix_pass(attached, layout)
    hidden = slot_pass(attached, layout, prefix)
    mx.eval(adapter_of(attached).parameters(), attached.draft_head(hidden), attached.head(hidden))
