"""The loss of MTP heads: cross-entropy (MTP), and distillation from the model's main head (MTP-D, arXiv 2603.23911).

    loss = sum_k decay^(k-1) * (ce * CE(head k, t[i+k+1]) + kl * mass * KL(teacher || head k)) / sum_k decay^(k-1)

The teacher of head k at position i is the main head at position i + k, which predicts the same token; it is a
constant. KL is over the teacher's N most likely columns, with both distributions renormalised over these, and is
multiplied by the square of the temperature.

mass, in [0, 1], is the teacher's probability of the columns that KL is over, as a share of its whole vocabulary. The
paper has no draft vocabulary and no such factor. Without it a row whose likely tokens cannot be drafted teaches, as
loudly as any other, a distribution over tokens that the teacher considers unlikely.

Without cross-entropy nothing would teach the columns outside the N: a head whose choice is one of them would have no
loss. So KL then has one more column, for all of these together.

Legend: M rows, C columns of the draft head, N of them kept, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx

from mtp_mlx.train.loss import finite, hard_cross_entropy


@dataclass(frozen=True)
class MTPDistil:
    """The loss, and the weights in it.

    Attributes:
        ce_weight: weight of the cross-entropy with the text; plain MTP has this loss only. If 0, nothing depends on
            the token that followed.
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

    def teacher(self, logits: mx.array, normaliser: mx.array) -> TeacherTop:
        """What this loss needs of a teacher's logits [M, C] and their `normaliser` [M], see `teacher_top`."""
        kept = self.kept(logits.shape[-1])
        return teacher_top(logits, kept, self.temperature, normaliser, with_rest=not self.ce_weight)

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
            parts["kl"] = teacher.mass * kl_to_teacher(logits, teacher, self.temperature)
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
        log_probs: [M, N] float32 log-probabilities, renormalised over the N columns; [M, N + 1] if the last one is
            that of all other columns together.
        mass: [M] float32, the teacher's probability of these columns, of 1 over its whole vocabulary.
        columns: [M, N] their numbers; None if all C are kept.
    """

    log_probs: mx.array
    mass: mx.array
    columns: mx.array | None = None

    @property
    def with_rest(self) -> bool:
        """Whether the last log-probability is that of all other columns together."""
        return self.columns is not None and self.log_probs.shape[-1] > self.columns.shape[-1]

    def rows(self, index: mx.array) -> TeacherTop:
        """The rows `index` [m]."""
        columns = None if self.columns is None else self.columns[index]
        return TeacherTop(self.log_probs[index], self.mass[index], columns)

    def arrays(self) -> list[mx.array]:
        """Its arrays, for evaluation."""
        return [self.log_probs, self.mass, *([] if self.columns is None else [self.columns])]

    @staticmethod
    def joined(pieces: Sequence[TeacherTop]) -> TeacherTop:
        """The rows of all pieces."""
        columns = [piece.columns for piece in pieces if piece.columns is not None]
        return TeacherTop(
            mx.concatenate([piece.log_probs for piece in pieces]),
            mx.concatenate([piece.mass for piece in pieces]),
            mx.concatenate(columns) if columns else None,
        )


def teacher_top(
    logits: mx.array,
    kept: int,
    temperature: float = 1.0,
    normaliser: mx.array | None = None,
    with_rest: bool = False,
) -> TeacherTop:
    """The `kept` most likely columns of logits [M, C]; `kept` is at least 1.

    Args:
        normaliser: [M] log of the sum of exp(logits / temperature) over the whole vocabulary; None if the C columns
            are the whole vocabulary.
        with_rest: whether the columns that are not kept count as one more.
    """
    teacher, columns = finite(mx.stop_gradient(logits)) / temperature, None
    if normaliser is None:
        normaliser = mx.logsumexp(teacher, axis=-1)
    if kept < teacher.shape[-1]:
        columns = mx.argpartition(-teacher, kth=kept - 1, axis=-1)[:, :kept]  # [M, N]
        teacher = _columns_of(teacher, columns, with_rest)
    own = mx.logsumexp(teacher, axis=-1, keepdims=True)
    # Over all columns both sums are the same but for rounding.
    mass = mx.minimum(mx.exp(own[:, 0] - mx.stop_gradient(normaliser)), 1.0)
    return TeacherTop(teacher - own, mass, columns)


def _columns_of(logits: mx.array, columns: mx.array, with_rest: bool) -> mx.array:
    """Logits [M, C] of the `columns` [M, N]; with the rest, [M, N + 1] and the last is that of all other columns."""
    chosen = mx.take_along_axis(logits, columns, axis=-1)
    if not with_rest:
        return chosen
    others = mx.put_along_axis(logits, columns, mx.array(-mx.inf), axis=-1)
    return mx.concatenate([chosen, mx.logsumexp(others, axis=-1, keepdims=True)], axis=-1)


def kl_to_teacher(logits: mx.array, teacher: TeacherTop, temperature: float = 1.0) -> mx.array:
    """temperature^2 * KL(teacher || student) over the teacher's columns: student's logits [M, C] -> float32 [M]."""
    student = finite(logits) / temperature
    if teacher.columns is not None:
        student = _columns_of(student, teacher.columns, teacher.with_rest)
    log_p = student - mx.logsumexp(student, axis=-1, keepdims=True)
    return temperature**2 * mx.sum(mx.exp(teacher.log_probs) * (teacher.log_probs - log_p), axis=-1)
