"""What the training steps of slots share: which positions of a text have a block of slots behind them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import mlx.core as mx
import numpy as np

from mtp_mlx.drafters.slots.adapter import adapter_of
from mtp_mlx.drafters.slots.layout import SlotLayout, build_layout, candidate_anchors
from mtp_mlx.drafters.slots.options import SlotSettings
from mtp_mlx.drafters.slots.two_pass import prefix_pass, slot_states
from mtp_mlx.model.attach import AttachedModel
from mtp_mlx.train.data import Example

BlockLengths = Literal["fixed", "random"]

TEACHER_CHUNK = 512  # real rows whose logits over the whole vocabulary are in memory at once


@dataclass(frozen=True)
class BlockChoice:
    """Draws the positions that have a block of slots, and the lengths of the blocks.

    Attributes:
        slots: k, slots per block.
        share: fraction of the candidate positions, (0, 1].
        most: maximum number of blocks per sequence; 0 = no limit.
        chunk_blocks: blocks that share a copy of the prefix.
        depth_decay: the loss of slot j has weight depth_decay ** (j - 1).
        lengths: "fixed": every block has k slots. "random": 1 to k, each as often, and none behind the text's end.
    """

    slots: int = 4
    share: float = 1.0
    most: int = 0
    chunk_blocks: int = 16
    depth_decay: float = 1.0
    lengths: BlockLengths = "fixed"

    @property
    def mean_slots(self) -> float:
        """Expected slots per block."""
        return (self.slots + 1) / 2 if self.lengths == "random" else self.slots

    def layout(self, examples: Sequence[Example], seed: int, step: int, lead: int = 0) -> SlotLayout:
        """The layout of a micro-batch; it depends on (seed, step) only, so a resumed run repeats it.

        Args:
            examples: of the micro-batch.
            seed: of the run.
            step: number of the micro-batch in the run.
            lead: as in `build_layout`.
        """
        random = np.random.default_rng((seed, step))
        anchors = []
        for example in examples:
            candidates = candidate_anchors(len(example), example.loss_start)
            count = int(np.ceil(self.share * len(candidates)))
            count = min(count, self.most) if self.most else count
            anchors.append(np.sort(random.permutation(candidates)[:count]))
        sequences = [example.tokens for example in examples]
        lengths = None
        if self.lengths == "random":
            lengths = [
                self._lengths(own, len(text), random) for own, text in zip(anchors, sequences, strict=True)
            ]
        return build_layout(sequences, anchors, self.slots, self.chunk_blocks, lead, lengths)

    def _lengths(self, anchors: np.ndarray, length: int, random: np.random.Generator) -> np.ndarray:
        """Slots behind each anchor of a text of `length` tokens: slot j needs the token at anchor + j + 1."""
        return np.minimum(random.integers(1, self.slots + 1, len(anchors)), length - 2 - anchors)


def taught(example: Example, settings: SlotSettings) -> Example:
    """The example as it is learnt from: all of it is a response if prompts are learnt from too.

    Prompts are not the base model's own text, but what it predicts in them teaches as well.
    """
    return example if settings.learn_from == "responses" else replace(example, loss_start=0)


def evaluate_constants(attached: AttachedModel, lead: int = 0, uniform: float | None = None) -> None:
    """Evaluates every array that the passes read: a lazy array belongs to the thread that made it.

    Args:
        lead: as in `build_layout`.
        uniform: what slots carry, if they carry uniforms.
    """
    layout = build_layout([[0, 0, 0]], [np.array([0], dtype=np.int32)], slots=1, chunk_blocks=1, lead=lead)
    prefix = prefix_pass(attached, layout)
    shape = layout.positions().shape
    hidden = slot_states(
        attached, layout, prefix, None if uniform is None else np.full(shape, uniform, dtype=np.float32)
    )
    mx.eval(adapter_of(attached).parameters(), attached.draft_head(hidden), attached.head(hidden))
