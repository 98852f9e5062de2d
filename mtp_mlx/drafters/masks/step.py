"""One training step of mask tokens: layout -> pass 1 -> pass 2 -> loss and gradients of the adapter."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mtp_mlx.drafters.slots.adapter import adapter_of
from mtp_mlx.drafters.slots.layout import SlotLayout
from mtp_mlx.drafters.slots.step import BlockChoice, draft_columns, evaluate_constants
from mtp_mlx.drafters.slots.two_pass import Prefix, prefix_pass, slot_pass
from mtp_mlx.model.attach import AttachedModel
from mtp_mlx.train.data import Example
from mtp_mlx.train.grad_checkpoint import checkpointed_layers
from mtp_mlx.train.loss import LossParts, Objective, SlotBatch
from mtp_mlx.train.step import MicroBatchRunner, Totals


@dataclass(frozen=True)
class TeacherTargets:
    """The base model's answers at the real rows that slots must predict (constants of a step)."""

    row: np.ndarray  # [M] index of each supervised slot row into the Q teacher rows
    hidden: mx.array  # [Q, D]
    probs: mx.array  # [Q, C]
    previous: mx.array  # [Q]
    label: mx.array  # [Q] draft column, -1 if none


def teacher_targets(
    attached: AttachedModel, layout: SlotLayout, prefix: Prefix, columns: np.ndarray, chunk_rows: int = 512
) -> TeacherTargets:
    """Base probabilities of the draft columns at every real row some slot must match."""
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
    """Puts pass 2's latents [M, D] together with what they must predict."""
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
    """Steps of a mask-token adapter."""

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
        """(supervised rows, loss, gradients of the adapter's parameters), evaluated."""
        attached, choice = self._attached, self._choice
        layout = choice.layout(examples, self._seed, number)
        with self._building:
            prefix = prefix_pass(attached, layout)
        mx.eval(prefix.arrays())
        targets = teacher_targets(attached, layout, prefix, self._columns)
        mx.eval(targets.probs)
        names: list[str] = []

        def loss() -> tuple[mx.array, ...]:
            with checkpointed_layers(attached) if self._grad_checkpoint else nullcontext():
                hidden = slot_pass(attached, layout, prefix)
            batch = slot_batch(hidden, layout, targets, self._columns, choice.depth_decay)
            result = self._objective(attached, batch)
            names[:] = list(result.parts)
            return (result.total, *result.parts.values())

        adapter = adapter_of(attached)
        with self._building:
            parameters = adapter.trainable_parameters()
            values, gradients = nn.value_and_grad(adapter, loss)()
            adapter.update(parameters)  # tracing leaves this thread's lazy copies in the module
        mx.eval(values, gradients)
        return len(layout.rows), LossParts(values[0], dict(zip(names, values[1:], strict=True))), gradients
