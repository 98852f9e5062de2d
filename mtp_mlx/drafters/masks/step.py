"""A micro-batch of mask-token training: layout -> pass 1, then by slices teacher -> pass 2 -> loss and gradients.

Nothing of a slice is computed twice, but for the teacher's rows that it shares with the next one (at most k).

Legend: M supervised slot rows, m of them in a slice, Q teacher rows of a slice, D hidden size, C columns of the draft
head, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from mtp_mlx.drafters.masks.losses import Objective, SlotBatch
from mtp_mlx.drafters.slots.adapter import adapter_of
from mtp_mlx.drafters.slots.layout import Part, SlotLayout
from mtp_mlx.drafters.slots.step import TEACHER_CHUNK, BlockChoice, evaluate_constants
from mtp_mlx.drafters.slots.two_pass import Prefix, prefix_pass, slot_pass
from mtp_mlx.model.attach import AttachedModel
from mtp_mlx.train.data import Example
from mtp_mlx.train.draft_vocabulary import draft_columns
from mtp_mlx.train.loss import LossParts
from mtp_mlx.train.plan import WHOLE, StepPlan
from mtp_mlx.train.step import MicroBatchRunner, Totals


@dataclass(frozen=True)
class TeacherTargets:
    """What the base model predicts at the teacher rows of a slice; constants.

    Attributes:
        rows: [Q] indices into the S * T real rows, ascending.
        hidden: [Q, D] hidden states.
        probs: [Q, C] probabilities of the draft columns.
        previous: [Q] int32 token at the row.
        label: [Q] int32 column of the token after it, -1 if it is outside the draft vocabulary.
    """

    rows: np.ndarray
    hidden: mx.array
    probs: mx.array
    previous: mx.array
    label: mx.array


def teacher_targets(
    attached: AttachedModel,
    layout: SlotLayout,
    prefix: Prefix,
    columns: np.ndarray,
    part: Part,
    chunk_rows: int = TEACHER_CHUNK,
) -> TeacherTargets:
    """The base model's predictions at every real row that predicts the token of a slot of a slice, evaluated.

    Args:
        columns: [V] as `draft_columns` gives them.
        part: the slice.
        chunk_rows: rows whose logits are in memory at once.
    """
    rows = np.unique(layout.target[part.rows])
    hidden = prefix.hidden[mx.array(rows)]  # [Q, D]
    ids = attached.draft_ids
    pieces = []
    for start in range(0, len(rows), chunk_rows):
        logits = attached.head(hidden[start : start + chunk_rows]).astype(mx.float32)
        norm = mx.logsumexp(logits, axis=-1, keepdims=True)
        pieces.append(mx.exp((logits if ids is None else logits[:, ids]) - norm))  # [<= chunk, C]
        mx.eval(pieces[-1])
    flat = layout.tokens.reshape(-1)
    following = flat[np.minimum(rows + 1, len(flat) - 1)]
    return TeacherTargets(
        rows=rows,
        hidden=hidden,
        probs=mx.concatenate(pieces) if len(pieces) > 1 else pieces[0],
        previous=mx.array(flat[rows]),
        label=mx.array(columns[following]),
    )


@dataclass(frozen=True)
class RowWeights:
    """Weights of the rows of a micro-batch, which its slices share.

    Attributes:
        loss: [M] float32 weight of each slot row's loss.
        matching: [M] float32 weight of each slot row in LCM: 1 / |S(t)| over the number of real rows.
        first: [M] bool: no slot row before it has the same teacher row.
    """

    loss: np.ndarray
    matching: np.ndarray
    first: np.ndarray


def row_weights(layout: SlotLayout, depth_decay: float) -> RowWeights:
    """The weights of a layout's rows; slot j has weight depth_decay ** (j - 1)."""
    _, first, row, count = np.unique(
        layout.target, return_index=True, return_inverse=True, return_counts=True
    )
    is_first = np.zeros(len(layout.target), dtype=bool)
    is_first[first] = True
    return RowWeights(
        loss=(depth_decay ** (layout.depth - 1).astype(np.float32)).astype(np.float32),
        matching=(1 / (count[row] * len(count))).astype(np.float32),
        first=is_first,
    )


def slot_batch(
    hidden: mx.array,
    layout: SlotLayout,
    part: Part,
    targets: TeacherTargets,
    weights: RowWeights,
    columns: np.ndarray,
) -> SlotBatch:
    """The hidden states [m, D] of pass 2 over a slice, with their targets."""
    own = part.rows
    row = np.searchsorted(targets.rows, layout.target[own]).astype(np.int32)
    return SlotBatch(
        hidden=hidden,
        weight=mx.array(weights.loss[own]),
        matching=mx.array(weights.matching[own]),
        teacher_row=mx.array(row),
        previous=mx.array(layout.previous[own]),
        label=mx.array(columns[layout.label[own]]),
        teacher_hidden=targets.hidden,
        teacher_probs=targets.probs,
        teacher_previous=targets.previous,
        teacher_label=targets.label,
        real=mx.array(row[weights.first[own]]),
        weight_sum=float(weights.loss.sum()),
        real_count=int(weights.first.sum()),
    )


class StepRunner(MicroBatchRunner):
    """Steps of a mask-token adapter.

    Args:
        attached: the base model with the adapter.
        objective: the loss.
        choice: which positions have a block of slots.
        seed: of the run.
        plan: slices and threads.
    """

    def __init__(
        self,
        attached: AttachedModel,
        objective: Objective,
        choice: BlockChoice,
        seed: int,
        plan: StepPlan = WHOLE,
    ) -> None:
        super().__init__(adapter_of(attached), plan.workers)
        self._attached, self._objective, self._choice, self._seed = attached, objective, choice, seed
        self._plan = plan
        self._columns = draft_columns(attached)
        if plan.workers > 1:
            evaluate_constants(attached)

    def _micro_batch(self, examples: Sequence[Example], number: int) -> Totals:
        """See `MicroBatchRunner`."""
        layout = self._choice.layout(examples, self._seed, number)
        with self._building:
            prefix = prefix_pass(self._attached, layout)
        mx.eval(prefix.arrays())
        weights = row_weights(layout, self._choice.depth_decay)
        losses = (
            self._loss_of(layout, prefix, weights, part) for part in layout.parts(self._plan.slice_rows)
        )
        return len(layout.rows), *self._sum(losses)

    def _loss_of(
        self, layout: SlotLayout, prefix: Prefix, weights: RowWeights, part: Part
    ) -> Callable[[], LossParts]:
        """The loss of a slice, whose teacher is evaluated now."""
        attached = self._attached
        targets = teacher_targets(attached, layout, prefix, self._columns, part)

        def loss() -> LossParts:
            with self._plan.layers(attached):
                hidden = slot_pass(attached, layout, prefix, part)
            return self._objective(
                attached, slot_batch(hidden, layout, part, targets, weights, self._columns)
            )

        return loss
