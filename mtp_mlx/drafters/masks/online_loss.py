"""The online, student-forced objective (arXiv 2602.06019, training): the student answers, the teacher marks it.

The student predicts the k tokens of a region at once; its own likeliest tokens are put where the masks were, and
the frozen teacher predicts every one of those positions after them. So the teacher's word for position j is
conditioned on what the student said before it, which is what unverified emission needs: runs that go together.

    hard-teacher    CE(student, argmax teacher), the published form
    soft-teacher    KL(teacher || student)
    ground-truth    CE(student, the text); nothing is student-forced then

The student's own tokens are only context, never targets, and carry no gradient. Mean over the supervised rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import mlx.core as mx

from mtp_mlx.train.loss import hard_cross_entropy, soft_cross_entropy

Supervision = Literal["hard-teacher", "soft-teacher", "ground-truth"]


@dataclass(frozen=True)
class Online:
    """Args: what a student's row is compared with; columns of the draft head.

    Attributes:
        supervision: see the module.
        columns: [V] int32 draft column of every id, -1 for ids that cannot be drafted.
        draft_ids: [C] int32 ids of the columns, or None where column = id.
    """

    supervision: Supervision
    columns: mx.array
    draft_ids: mx.array | None = None

    @property
    def needs_teacher(self) -> bool:
        """Whether a teacher pass has to be run."""
        return self.supervision != "ground-truth"

    def picks(self, logits: mx.array) -> mx.array:
        """The student's own tokens, int32 [M], of its logits [M, C]; constants."""
        column = mx.argmax(mx.stop_gradient(logits), axis=-1).astype(mx.int32)
        return column if self.draft_ids is None else self.draft_ids[column]

    def rows_loss(self, logits: mx.array, teacher_logits: mx.array | None, label: mx.array) -> mx.array:
        """Loss of every row, float32 [M].

        Args:
            logits: [M, C] of the student, over the draft columns.
            teacher_logits: [M, V] of the teacher, over the whole vocabulary; None where none is needed.
            label: [M] int32 id of the token that follows in the text.
        """
        if teacher_logits is None:
            return hard_cross_entropy(logits, self.columns[label])
        teacher = mx.stop_gradient(teacher_logits).astype(mx.float32)
        if self.supervision == "hard-teacher":
            return hard_cross_entropy(logits, self.columns[mx.argmax(teacher, axis=-1)])
        log_p = teacher - mx.logsumexp(teacher, axis=-1, keepdims=True)
        log_p = log_p if self.draft_ids is None else log_p[:, self.draft_ids]
        p = mx.exp(log_p)
        return soft_cross_entropy(logits, p) + mx.sum(p * log_p, axis=-1)


def student_context(first: mx.array, picks: mx.array) -> mx.array:
    """What stands where the masks were: [G, k - 1] ids.

    Args:
        first: [G] the token picked at each region's last real row.
        picks: [G, k - 1] the tokens picked at its masks; the last one is nobody's context.
    """
    return mx.concatenate([first[:, None], picks[:, :-1]], axis=1)
