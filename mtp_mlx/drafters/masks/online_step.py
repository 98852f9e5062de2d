"""A micro-batch of online self-distillation of a gated adapter, in three passes; the teacher is the base model.

Pass 1 runs the base over the texts, pass 2 the masks behind the last real token of each region (with gradients),
pass 3 the base over the tokens that the student picked, in place of the masks. Passes 2 and 3 run slice by slice.
Real rows do not depend on the adapter, so the first token of a region, which its last real row predicts, trains
nothing: a region has k - 1 rows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import mlx.core as mx
import numpy as np

from mtp_mlx.drafters.masks.online_loss import Online, student_context
from mtp_mlx.drafters.masks.regions import draw_regions, region_anchors
from mtp_mlx.drafters.slots.adapter import adapter_of
from mtp_mlx.drafters.slots.layout import Part, SlotLayout, build_layout
from mtp_mlx.drafters.slots.step import evaluate_constants
from mtp_mlx.drafters.slots.two_pass import Prefix, every_slot_pass, prefix_pass, token_pass
from mtp_mlx.model.attach import AttachedModel
from mtp_mlx.train.data import Example
from mtp_mlx.train.loss import LossParts, sum_over_chunks
from mtp_mlx.train.plan import WHOLE, StepPlan
from mtp_mlx.train.step import MicroBatchRunner, Totals


class OnlineRunner(MicroBatchRunner):
    """Steps of a gated adapter with the online objective.

    Args:
        attached: the base model with the adapter.
        objective: see `Online`.
        k_most: tokens that a region predicts at most; k is drawn from 2 to `k_most`.
        region_rows: rows of a region, real tokens and masks.
        seed: of the run; k and offset depend on it and on the number of the micro-batch.
        chunk_blocks: regions that share a copy of the prefix.
        chunk_rows: rows whose logits are in memory at once.
        plan: slices and threads.
    """

    def __init__(
        self,
        attached: AttachedModel,
        objective: Online,
        k_most: int,
        region_rows: int,
        seed: int,
        chunk_blocks: int = 16,
        chunk_rows: int = 2048,
        plan: StepPlan = WHOLE,
    ) -> None:
        super().__init__(adapter_of(attached), plan.workers)
        self._attached, self._objective = attached, objective
        self._k_most, self._region_rows, self._seed = k_most, region_rows, seed
        self._chunk_blocks, self._chunk_rows = chunk_blocks, chunk_rows
        self._plan = plan
        mx.eval(objective.columns)
        if plan.workers > 1:
            evaluate_constants(attached)

    def layout(self, examples: Sequence[Example], number: int) -> SlotLayout:
        """The regions of micro-batch `number`, with the same k and offset in all its texts."""
        random = np.random.default_rng((self._seed, number))
        k, offset = draw_regions(examples, self._k_most, self._region_rows, random)
        anchors = [region_anchors(len(e), e.loss_start, k, offset, self._region_rows) for e in examples]
        return build_layout([e.tokens for e in examples], anchors, k - 1, self._chunk_blocks)

    def _micro_batch(self, examples: Sequence[Example], number: int) -> Totals:
        layout = self.layout(examples, number)
        with self._building:
            prefix = prefix_pass(self._attached, layout)
        mx.eval(prefix.arrays())
        parts = layout.parts(self._plan.slice_rows)
        return len(layout.rows), *self._sum(self._loss_of(layout, prefix, part) for part in parts)

    def _loss_of(self, layout: SlotLayout, prefix: Prefix, part: Part) -> Callable[[], LossParts]:
        """The loss of a slice; what the base picks behind its last real tokens is evaluated now."""
        attached = self._attached
        first = self._first_picks(layout, prefix, part)
        mx.eval(first)
        rows = mx.array(layout.rows[part.rows] - part.chunks.start * layout.chunk_rows)

        def loss() -> LossParts:
            with self._plan.layers(attached):
                hidden = every_slot_pass(attached, layout, prefix, part)  # [regions * (k - 1), D]
            arrays = [hidden[rows], mx.array(layout.label[part.rows])]
            if self._objective.needs_teacher:
                arrays.append(self._teacher(layout, prefix, part, first, hidden)[rows])
            return LossParts(sum_over_chunks(self._rows_loss, self._chunk_rows, *arrays) / len(layout.rows))

        return loss

    def _rows_loss(
        self, hidden: mx.array, label: mx.array, teacher_hidden: mx.array | None = None
    ) -> mx.array:
        """Sum of the losses of rows, from hidden states of student and teacher [m, D] and labels [m]."""
        teacher = None if teacher_hidden is None else self._attached.head(teacher_hidden)
        return mx.sum(self._objective.rows_loss(self._attached.draft_head(hidden), teacher, label))

    def _first_picks(self, layout: SlotLayout, prefix: Prefix, part: Part) -> mx.array:
        """The base's most likely token behind the last real token of each region of a slice, [regions]."""
        anchors = layout.of_block(layout.anchors).reshape(-1, layout.chunk_rows)[part.chunks]
        anchors = anchors.reshape(-1, layout.slots)[:, 0]
        rows = part.sequence * layout.tokens.shape[1] + anchors
        return self._in_chunks(
            prefix.hidden[mx.array(rows)], lambda h: mx.argmax(self._attached.head(h), axis=-1)
        )

    def _teacher(
        self, layout: SlotLayout, prefix: Prefix, part: Part, first: mx.array, hidden: mx.array
    ) -> mx.array:
        """Hidden states of the base with the student's tokens in place of the masks, [regions * (k - 1), D]."""
        constant = mx.stop_gradient(hidden)
        picks = self._in_chunks(constant, lambda h: self._objective.picks(self._attached.draft_head(h)))
        filled = student_context(first, picks.reshape(-1, layout.slots))
        return mx.stop_gradient(token_pass(self._attached, layout, prefix, part, filled.reshape(-1)))

    def _in_chunks(self, hidden: mx.array, ids: Callable[[mx.array], mx.array]) -> mx.array:
        """`ids` of hidden states [M, D] in chunks, int32 [M]."""
        starts = range(0, len(hidden), self._chunk_rows)
        pieces = [ids(hidden[start : start + self._chunk_rows]) for start in starts]
        return mx.concatenate(pieces).astype(mx.int32)
