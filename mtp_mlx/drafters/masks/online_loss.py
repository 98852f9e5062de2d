"""The online, student-forced objective of the mask token (arXiv 2602.06019).

The student predicts the k tokens of a region at once. Its most likely tokens replace the masks, and the frozen
teacher predicts every position of the region after them. So the teacher's prediction at position j is conditioned
on the student's own tokens before it, and the student learns tokens that fit together, as unverified emission needs.

    hard-teacher    CE(student, argmax teacher), the published form
    soft-teacher    KL(teacher || student)
    ground-truth    CE(student, the text), without student forcing

The student's tokens are context only, never targets, and carry no gradient. The loss is a mean over supervised rows.

Legend: M rows, C draft columns, V vocabulary, G regions.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import mlx.core as mx

from mtp_mlx.train.loss import finite, hard_cross_entropy, soft_cross_entropy

Supervision = Literal["hard-teacher", "soft-teacher", "ground-truth"]


@dataclass(frozen=True)
class Online:
    """The objective.

    Attributes:
        supervision: see the module.
        columns: [V] int32 draft column of every id, -1 for ids outside the draft vocabulary.
        draft_ids: [C] int32 id of every draft column; None if column = id.
    """

    supervision: Supervision
    columns: mx.array
    draft_ids: mx.array | None = None

    @property
    def needs_teacher(self) -> bool:
        """Whether the loss needs the teacher's pass."""
        return self.supervision != "ground-truth"

    def picks(self, logits: mx.array) -> mx.array:
        """The student's most likely tokens, int32 [M], from its logits [M, C]; constants."""
        column = mx.argmax(mx.stop_gradient(logits), axis=-1).astype(mx.int32)
        return column if self.draft_ids is None else self.draft_ids[column]

    def rows_loss(self, logits: mx.array, teacher_logits: mx.array | None, label: mx.array) -> mx.array:
        """Loss of every row, float32 [M].

        Args:
            logits: [M, C] of the student.
            teacher_logits: [M, V] of the teacher; None without a teacher.
            label: [M] int32 id of the next token of the text.
        """
        if teacher_logits is None:
            return hard_cross_entropy(logits, self.columns[label])
        teacher = finite(mx.stop_gradient(teacher_logits))
        if self.supervision == "hard-teacher":
            return hard_cross_entropy(logits, self.columns[mx.argmax(teacher, axis=-1)])
        log_p = teacher - mx.logsumexp(teacher, axis=-1, keepdims=True)
        log_p = log_p if self.draft_ids is None else log_p[:, self.draft_ids]
        p = mx.exp(log_p)
        return soft_cross_entropy(logits, p) + mx.sum(p * log_p, axis=-1)


def student_context(first: mx.array, picks: mx.array) -> mx.array:
    """Ids that replace the masks, [G, k - 1].

    Args:
        first: [G] the token picked at each region's last real row.
        picks: [G, k - 1] the tokens picked at its masks; no row comes after the last one.
    """
    return mx.concatenate([first[:, None], picks[:, :-1]], axis=1)
