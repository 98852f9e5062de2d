"""The losses of MTP heads: plain cross-entropy (MTP), and distillation from the model's own main head (MTP-D,
arXiv 2603.23911).

    loss = sum_k decay^(k-1) * (ce * CE(head k, t[i+k+1]) + kl * KL(teacher || head k)) / sum_k decay^(k-1)

The teacher of head k at position i is the main head at position i + k, which predicts the same token; it is a
constant. KL is forward (the teacher's probabilities weigh the logs), over the teacher's N likeliest columns, with
both sides renormalised over these N, and is multiplied by temperature squared.

Legend: M rows, C columns of the draft head, N columns kept.
"""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx

from mtp_mlx.train.objectives.base import hard_cross_entropy


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

    def rows_loss(self, logits: mx.array, teacher_logits: mx.array, label: mx.array) -> mx.array:
        """Loss of every row of one head, float32 [M].

        Args:
            logits: [M, C] of the head.
            teacher_logits: [M, C] of the main head at the rows that predict the same tokens.
            label: [M] int32 column of the token that followed, -1 if it has none (no cross-entropy there).
        """
        loss = mx.zeros((logits.shape[0],))
        if self.ce_weight:
            loss = loss + self.ce_weight * hard_cross_entropy(logits, label)
        if self.kl_weight:
            kept = max(1, round(self.top_share * logits.shape[-1]))
            loss = loss + self.kl_weight * top_kl(logits, teacher_logits, kept, self.temperature)
        return loss

    def head_weights(self, count: int) -> list[float]:
        """[count] weights of the heads, summing to 1."""
        weights = [self.decay**index for index in range(count)]
        return [weight / sum(weights) for weight in weights]


def top_kl(logits: mx.array, teacher_logits: mx.array, kept: int, temperature: float = 1.0) -> mx.array:
    """temperature^2 * KL(teacher || student) over the teacher's `kept` likeliest columns, float32 [M].

    Args:
        logits, teacher_logits: [M, C]; the teacher is a constant.
        kept: N, at least 1.
    """
    teacher = mx.stop_gradient(teacher_logits.astype(mx.float32))
    student = logits.astype(mx.float32)
    if kept < teacher.shape[-1]:
        columns = mx.argpartition(-teacher, kth=kept - 1, axis=-1)[:, :kept]  # [M, N]
        teacher = mx.take_along_axis(teacher, columns, axis=-1)
        student = mx.take_along_axis(student, columns, axis=-1)
    teacher, student = teacher / temperature, student / temperature
    log_q = teacher - mx.logsumexp(teacher, axis=-1, keepdims=True)
    log_p = student - mx.logsumexp(student, axis=-1, keepdims=True)
    return temperature**2 * mx.sum(mx.exp(log_q) * (log_q - log_p), axis=-1)
