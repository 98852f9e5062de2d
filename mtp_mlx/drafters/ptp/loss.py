"""The losses of Parallel Token Prediction (arXiv 2512.21323, section 3).

    O-PTP   CE of the token that the uniforms pick; it can reach 0, since the uniforms determine the token
    C-PTP   CE of the text's token, or KL(Q || P), or KL(P || Q), where Q is the teacher's distribution of the token
            and P the slot's

Logits of C-PTP are on the base model's scale: logits of both are divided by the teacher's temperature, so that a
picker can treat a slot's logits like those of the target, at any temperature. KL is over the draft columns, with both
distributions renormalised over them, and multiplied by the teacher's probability of all of them together: a row whose
token can hardly be drafted has little to teach.

Legend: M rows, C draft columns, Q teacher rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import mlx.core as mx

from mtp_mlx.model.attach import AttachedModel
from mtp_mlx.train.loss import LossParts, finite, hard_cross_entropy, sum_over_chunks

PTPLossName = Literal["ce", "kl", "reverse-kl"]


@dataclass(frozen=True)
class PTPBatch:
    """Supervised rows of a slice, M of them.

    Attributes:
        hidden: [M, D] hidden states of the slots after the final norm; carries gradients.
        label: [M] int32 column of the token to predict, -1 if it is outside the draft vocabulary.
        weight: [M] float32; 0 for rows that are not trained on.
        greedy: [M] bool, rows of blocks for temperature 0, whose loss is always CE, at temperature 1.
        teacher_row: [M] int32 index into `teacher_logits`.
        weight_sum: of the weights of all rows of the micro-batch.
        row_count: number of rows of the micro-batch.
        teacher_logits: [Q, C] of the draft columns, constants; None if the loss is CE.
        teacher_mass: [Q] float32, the teacher's probability of all draft columns together, at its temperature;
            constants; None if the loss is CE.
    """

    hidden: mx.array
    label: mx.array
    weight: mx.array
    greedy: mx.array
    teacher_row: mx.array
    weight_sum: float
    row_count: int
    teacher_logits: mx.array | None = None
    teacher_mass: mx.array | None = None


@dataclass(frozen=True)
class PTPLoss:
    """The loss, a weighted mean over rows.

    Attributes:
        name: cross-entropy, KL(Q || P) or KL(P || Q).
        temperature: divides the logits of both; 1 for O-PTP.
        chunk_rows: rows whose logits are in memory at once.
    """

    name: PTPLossName = "ce"
    temperature: float = 1.0
    chunk_rows: int = 2048

    def __call__(self, attached: AttachedModel, batch: PTPBatch) -> LossParts:
        """A slice's share of the loss; its parts are itself, by name, and of the rows with a weight, "used"."""
        norm = max(batch.weight_sum, 1e-9)
        constants = (batch.label, batch.weight, batch.greedy, batch.teacher_row)

        def chunk(
            hidden: mx.array, label: mx.array, weight: mx.array, greedy: mx.array, row: mx.array
        ) -> mx.array:
            logits = attached.draft_head(hidden)
            if batch.teacher_logits is None or batch.teacher_mass is None:
                return mx.sum(weight * self.rows_loss(logits, label, greedy))
            teacher, mass = batch.teacher_logits[row], batch.teacher_mass[row]
            return mx.sum(weight * self.rows_loss(logits, label, greedy, teacher, mass))

        total = sum_over_chunks(chunk, self.chunk_rows, batch.hidden, *constants) / norm
        used = mx.sum(batch.weight > 0).astype(mx.float32) / batch.row_count
        return LossParts(total, {self.name: total, "used": used})

    def rows_loss(
        self,
        logits: mx.array,
        label: mx.array,
        greedy: mx.array,
        teacher: mx.array | None = None,
        mass: mx.array | float = 1.0,
    ) -> mx.array:
        """Loss of every row, float32 [m].

        Args:
            logits: [m, C] of the slots.
            label, greedy: [m], see `PTPBatch`.
            teacher: [m, C] logits; None for CE.
            mass: [m], see `PTPBatch`.
        """
        scaled = logits.astype(mx.float32) * (1.0 / self.temperature)
        if teacher is None:
            own = hard_cross_entropy(scaled, label)
        else:
            own = mass * divergence(teacher.astype(mx.float32) * (1.0 / self.temperature), scaled, self.name)
        return mx.where(greedy, hard_cross_entropy(logits, label), own)


def divergence(teacher: mx.array, student: mx.array, name: PTPLossName) -> mx.array:
    """KL(Q || P), or for "reverse-kl" KL(P || Q), of logits [m, C]: float32 [m]. The teacher Q is a constant."""
    teacher, student = finite(mx.stop_gradient(teacher)), finite(student)
    log_q = teacher - mx.logsumexp(teacher, axis=-1, keepdims=True)
    log_p = student - mx.logsumexp(student, axis=-1, keepdims=True)
    if name == "kl":
        return mx.sum(mx.exp(log_q) * (log_q - log_p), axis=-1)
    return mx.sum(mx.exp(log_p) * (log_p - log_q), axis=-1)
