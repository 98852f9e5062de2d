"""The losses of MTP heads: plain cross-entropy (MTP), and distillation from the model's own main head (MTP-D,
arXiv 2603.23911).

    loss = sum_k decay^(k-1) * (ce * CE(head k, t[i+k+1]) + kl * KL(teacher || head k)) / sum_k decay^(k-1)

The teacher of head k at position i is the main head at position i + k, which predicts the same token; it is a
constant. KL is forward (the teacher's probabilities weigh the logs), over the teacher's N likeliest columns, with
both sides renormalised over these N, and is multiplied by temperature squared.

Legend: M rows, C columns of the draft head, N columns kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx

from mtp_mlx.train.loss import hard_cross_entropy


@dataclass(frozen=True)
class MTPDistil:
    """Weights of the two losses.

    Attributes:
        ce_weight: of cross-entropy with the token that followed; the only one in plain MTP.
        kl_weight: of distillation (beta in the paper, 1.0).
        top_share: N as a share of the columns; 1 keeps all. The paper's 10,000 of 122,880 is 0.08.
        temperature: of the distributions that are compared.
        decay: weight of head k is decay^(k-1).
    """

    ce_weight: float = 1.0
    kl_weight: float = 1.0
    top_share: float = 0.08
    temperature: float = 1.0
    decay: float = 1.0

    def kept(self, columns: int) -> int:
        """N of so many columns."""
        return max(1, round(self.top_share * columns))

    def rows_loss(self, logits: mx.array, teacher_logits: mx.array, label: mx.array) -> mx.array:
        """Loss of every row of one head, float32 [M].

        Args:
            logits: [M, C] of the head.
            teacher_logits: [M, C] of the main head at the rows that predict the same tokens.
            label: [M] int32 column of the token that followed, -1 if it has none (no cross-entropy there).
        """
        teacher = teacher_top(teacher_logits, self.kept(logits.shape[-1]), self.temperature)
        parts = self.rows_parts(logits, teacher, label)
        return sum((self.weight(name) * part for name, part in parts.items()), mx.zeros(label.shape))

    def rows_parts(
        self, logits: mx.array, teacher: TeacherTop | None, label: mx.array
    ) -> dict[str, mx.array]:
        """The losses that have a weight, float32 [M] each, not weighted: "ce" and "kl".

        Args:
            logits: [M, C] of the head.
            teacher: of the same rows; None is enough where `kl_weight` is 0.
            label: see `rows_loss`.
        """
        parts = {}
        if self.ce_weight:
            parts["ce"] = hard_cross_entropy(logits, label)
        if self.kl_weight:
            assert teacher is not None
            parts["kl"] = kl_to_teacher(logits, teacher, self.temperature)
        return parts

    def weight(self, name: str) -> float:
        """Of the part "ce" or "kl"."""
        return {"ce": self.ce_weight, "kl": self.kl_weight}[name]

    def head_weights(self, depths: Sequence[int]) -> list[float]:
        """Weights of the heads of some depths, summing to 1."""
        weights = [self.decay ** (depth - 1) for depth in depths]
        return [weight / sum(weights) for weight in weights]


@dataclass(frozen=True)
class TeacherTop:
    """The teacher's likeliest columns of every row; constants.

    Attributes:
        log_probs: [M, N] float32, renormalised over the N columns.
        columns: [M, N] which they are, or None where all C are kept.
    """

    log_probs: mx.array
    columns: mx.array | None = None

    def rows(self, index: mx.array) -> TeacherTop:
        """Those of some rows [m], in that order."""
        columns = None if self.columns is None else self.columns[index]
        return TeacherTop(self.log_probs[index], columns)

    def arrays(self) -> list[mx.array]:
        """For evaluation."""
        return [self.log_probs, *([] if self.columns is None else [self.columns])]


def teacher_top(logits: mx.array, kept: int, temperature: float = 1.0) -> TeacherTop:
    """The `kept` likeliest columns of logits [M, C], at least 1."""
    teacher, columns = mx.stop_gradient(logits.astype(mx.float32)), None
    if kept < teacher.shape[-1]:
        columns = mx.argpartition(-teacher, kth=kept - 1, axis=-1)[:, :kept]  # [M, N]
        teacher = mx.take_along_axis(teacher, columns, axis=-1)
    teacher = teacher / temperature
    return TeacherTop(teacher - mx.logsumexp(teacher, axis=-1, keepdims=True), columns)


def kl_to_teacher(logits: mx.array, teacher: TeacherTop, temperature: float = 1.0) -> mx.array:
    """temperature^2 * KL(teacher || student) over the teacher's columns, of logits [M, C]: float32 [M]."""
    student = logits.astype(mx.float32)
    if teacher.columns is not None:
        student = mx.take_along_axis(student, teacher.columns, axis=-1)
    student = student / temperature
    log_p = student - mx.logsumexp(student, axis=-1, keepdims=True)
    return temperature**2 * mx.sum(mx.exp(teacher.log_probs) * (teacher.log_probs - log_p), axis=-1)


def top_kl(logits: mx.array, teacher_logits: mx.array, kept: int, temperature: float = 1.0) -> mx.array:
    """temperature^2 * KL(teacher || student) over the teacher's `kept` likeliest columns, float32 [M].

    Args:
        logits, teacher_logits: [M, C]; the teacher is a constant.
        kept: N, at least 1.
    """
    return kl_to_teacher(logits, teacher_top(teacher_logits, kept, temperature), temperature)
