"""A micro-batch of mask-token training: layout -> pass 1 -> teacher targets -> pass 2 -> loss and gradients.

Legend: M supervised slot rows, Q teacher rows, D hidden size, C columns of the draft head, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from mtp_mlx.drafters.masks.losses import Objective, SlotBatch
from mtp_mlx.drafters.slots.adapter import adapter_of
from mtp_mlx.drafters.slots.layout import SlotLayout
from mtp_mlx.drafters.slots.step import TEACHER_CHUNK, BlockChoice, evaluate_constants
from mtp_mlx.drafters.slots.two_pass import Prefix, prefix_pass, slot_pass
from mtp_mlx.model.attach import AttachedModel
from mtp_mlx.train.data import Example
from mtp_mlx.train.draft_vocabulary import draft_columns
from mtp_mlx.train.grad_checkpoint import checkpointed_layers
from mtp_mlx.train.loss import LossParts
from mtp_mlx.train.step import MicroBatchRunner, Totals


@dataclass(frozen=True)
class TeacherTargets:
    """What the base model predicts at the teacher rows; constants.

    Attributes:
        row: [M] int32 teacher row of each supervised slot row.
        hidden: [Q, D] hidden states.
        probs: [Q, C] probabilities of the draft columns.
        previous: [Q] int32 token at the row.
        label: [Q] int32 column of the token after it, -1 if it is outside the draft vocabulary.
    """

    row: np.ndarray
    hidden: mx.array
    probs: mx.array
    previous: mx.array
    label: mx.array


def teacher_targets(
    attached: AttachedModel,
    layout: SlotLayout,
    prefix: Prefix,
    columns: np.ndarray,
    chunk_rows: int = TEACHER_CHUNK,
) -> TeacherTargets:
    """The base model's predictions at every real row that predicts the token of a slot.

    Args:
        columns: [V] as `draft_columns` gives them.
        chunk_rows: rows whose logits are in memory at once.
    """
    rows, row = np.unique(layout.target, return_inverse=True)
    hidden = prefix.hidden[mx.array(rows)]  # [Q, D]
    ids = attached.draft_ids
    pieces = []
    for start in range(0, len(rows), chunk_rows):
        logits = attached.head(hidden[start : start + chunk_rows]).astype(mx.float32)
        norm = mx.logsumexp(logits, axis=-1, keepdims=True)
        piece = mx.exp((logits if ids is None else logits[:, ids]) - norm)  # [<= chunk, C]
        pieces.append(piece)
    flat = layout.tokens.reshape(-1)
    following = flat[np.minimum(rows + 1, len(flat) - 1)]
    return TeacherTargets(
        row=row.astype(np.int32),
        hidden=hidden,
        probs=mx.concatenate(pieces),
        previous=mx.array(flat[rows]),
        label=mx.array(columns[following]),
    )


def slot_batch(
    hidden: mx.array, layout: SlotLayout, targets: TeacherTargets, columns: np.ndarray, depth_decay: float
) -> SlotBatch:
    """The hidden states [M, D] of pass 2 with their targets."""
    weight = depth_decay ** (layout.depth - 1).astype(np.float32)
    return SlotBatch(
        hidden=hidden,
        depth=mx.array(layout.depth),
        weight=mx.array(weight.astype(np.float32)),
        teacher_row=mx.array(targets.row),
        previous=mx.array(layout.previous),
        label=mx.array(columns[layout.label]),
        teacher_hidden=targets.hidden,
        teacher_probs=targets.probs,
        teacher_previous=targets.previous,
        teacher_label=targets.label,
    )


class StepRunner(MicroBatchRunner):
    """Steps of a mask-token adapter.

    Args:
        attached: the base model with the adapter.
        objective: the loss.
        choice: which positions have a block of slots.
        seed: of the run.
        workers: see `MicroBatchRunner`.
        grad_checkpoint: whether layers are recomputed in the backward pass.
    """

    def __init__(
        self,
        attached: AttachedModel,
        objective: Objective,
        choice: BlockChoice,
        seed: int,
        workers: int = 1,
        grad_checkpoint: bool = False,
    ) -> None:
        super().__init__(adapter_of(attached), workers)
        self._attached, self._objective, self._choice, self._seed = attached, objective, choice, seed
        self._grad_checkpoint = grad_checkpoint
        self._columns = draft_columns(attached)
        if workers > 1:
            evaluate_constants(attached)

    def _micro_batch(self, examples: Sequence[Example], number: int) -> Totals:
        """See `MicroBatchRunner`."""
        attached, choice = self._attached, self._choice
        layout = choice.layout(examples, self._seed, number)
        with self._building:
            prefix = prefix_pass(attached, layout)
        mx.eval(prefix.arrays())
        targets = teacher_targets(attached, layout, prefix, self._columns)
        mx.eval(targets.probs)

        def loss() -> LossParts:
            with checkpointed_layers(attached) if self._grad_checkpoint else nullcontext():
                hidden = slot_pass(attached, layout, prefix)
            batch = slot_batch(hidden, layout, targets, self._columns, choice.depth_decay)
            return self._objective(attached, batch)

        return len(layout.rows), *self._loss_and_gradients(loss)
