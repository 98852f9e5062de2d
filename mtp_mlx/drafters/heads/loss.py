"""The loss of MTP heads: cross-entropy (MTP), and distillation from the model's main head (MTP-D, arXiv 2603.23911).

    loss = sum_k decay^(k-1) * (ce * CE(head k, t[i+k+1]) + kl * KL(teacher || head k)) / sum_k decay^(k-1)

The teacher of head k at position i is the main head at position i + k, which predicts the same token; it is a
constant. KL is over the teacher's N most likely columns, with both distributions renormalised over these, and is
multiplied by the square of the temperature.

Legend: M rows, C columns of the draft head, N of them kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx

from mtp_mlx.train.loss import hard_cross_entropy


@dataclass(frozen=True)
class MTPDistil:
    """The loss, and the weights in it.

    Attributes:
        ce_weight: weight of the cross-entropy with the text; plain MTP has this loss only.
        kl_weight: weight of distillation (beta in the paper, 1.0).
        top_share: N as a fraction of the columns; 1 keeps all. The paper's 10,000 of 122,880 is 0.08.
        temperature: distillation temperature.
        decay: head k has weight decay^(k-1).
    """

    ce_weight: float = 1.0
    kl_weight: float = 1.0
    top_share: float = 0.08
    temperature: float = 1.0
    decay: float = 1.0

    def kept(self, columns: int) -> int:
        """N, the number of columns kept of `columns`."""
        return max(1, round(self.top_share * columns))

    def rows_parts(
        self, logits: mx.array, teacher: TeacherTop | None, label: mx.array
    ) -> dict[str, mx.array]:
        """The parts "ce" and "kl" whose weight is not 0, before weighting, float32 [M] each.

        Args:
            logits: [M, C] of the head.
            teacher: of the same rows; may be None if `kl_weight` is 0.
            label: [M] int32 column of the token that followed; -1, without cross-entropy, if it is outside the draft
                vocabulary.
        """
        parts = {}
        if self.ce_weight:
            parts["ce"] = hard_cross_entropy(logits, label)
        if self.kl_weight:
            assert teacher is not None
            parts["kl"] = kl_to_teacher(logits, teacher, self.temperature)
        return parts

    def total(self, parts: dict[str, mx.array]) -> mx.array:
        """Weighted sum of the parts "ce" and "kl"."""
        weights = {"ce": self.ce_weight, "kl": self.kl_weight}
        return sum((weights[name] * part for name, part in parts.items()), mx.zeros(()))

    def head_weights(self, depths: Sequence[int]) -> list[float]:
        """Weights of the heads at `depths`; their sum is 1."""
        weights = [self.decay ** (depth - 1) for depth in depths]
        return [weight / sum(weights) for weight in weights]


@dataclass(frozen=True)
class TeacherTop:
    """The teacher's N most likely columns of every row; constants.

    Attributes:
        log_probs: [M, N] float32 log-probabilities, renormalised over the N columns.
        columns: [M, N] their numbers; None if all C are kept.
    """

    log_probs: mx.array
    columns: mx.array | None = None

    def rows(self, index: mx.array) -> TeacherTop:
        """The rows `index` [m]."""
        columns = None if self.columns is None else self.columns[index]
        return TeacherTop(self.log_probs[index], columns)

    def arrays(self) -> list[mx.array]:
        """Its arrays, for evaluation."""
        return [self.log_probs, *([] if self.columns is None else [self.columns])]


def teacher_top(logits: mx.array, kept: int, temperature: float = 1.0) -> TeacherTop:
    """The `kept` most likely columns of logits [M, C]; `kept` is at least 1."""
    teacher, columns = mx.stop_gradient(logits.astype(mx.float32)), None
    if kept < teacher.shape[-1]:
        columns = mx.argpartition(-teacher, kth=kept - 1, axis=-1)[:, :kept]  # [M, N]
        teacher = mx.take_along_axis(teacher, columns, axis=-1)
    teacher = teacher / temperature
    return TeacherTop(teacher - mx.logsumexp(teacher, axis=-1, keepdims=True), columns)


def kl_to_teacher(logits: mx.array, teacher: TeacherTop, temperature: float = 1.0) -> mx.array:
    """temperature^2 * KL(teacher || student) over the teacher's columns: student's logits [M, C] -> float32 [M]."""
    student = logits.astype(mx.float32)
    if teacher.columns is not None:
        student = mx.take_along_axis(student, teacher.columns, axis=-1)
    student = student / temperature
    log_p = student - mx.logsumexp(student, axis=-1, keepdims=True)
    return temperature**2 * mx.sum(mx.exp(teacher.log_probs) * (teacher.log_probs - log_p), axis=-1)
