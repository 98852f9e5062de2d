"""Self-distillation: slots learn the base model's own next-token distribution one or more tokens early.

loss = sum_rows weight * (CE(teacher, base head) + CE(teacher, sampler head)), teacher = the frozen base at
the real row that predicts the same token. Soft targets; y_prev of the sampler head is the previous label.
"""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx

from mtp_mlx.model.attach import AttachedModel
from mtp_mlx.train.objectives.base import LossParts, SlotBatch, soft_cross_entropy, sum_over_chunks


@dataclass(frozen=True)
class SelfDistil:
    """Args: weights of the two heads; rows whose logits are held at once."""

    base_weight: float = 1.0
    sampler_weight: float = 1.0
    chunk_rows: int = 2048

    def __call__(self, attached: AttachedModel, batch: SlotBatch) -> LossParts:
        """Weighted mean over the supervised rows; see the module's formula."""
        assert attached.adapter is not None
        sampler = attached.adapter.sampler
        norm = mx.sum(batch.weight)

        def base_loss(hidden: mx.array, row: mx.array, weight: mx.array) -> mx.array:
            return mx.sum(weight * soft_cross_entropy(attached.draft_head(hidden), batch.teacher_probs[row]))

        def sampler_loss(hidden: mx.array, row: mx.array, weight: mx.array, previous: mx.array) -> mx.array:
            refined = sampler(attached.embed(previous), hidden)
            return mx.sum(weight * soft_cross_entropy(attached.draft_head(refined), batch.teacher_probs[row]))

        rows = (batch.hidden, batch.teacher_row, batch.weight)
        parts = {"base": mx.zeros(()), "sampler": mx.zeros(())}
        if self.base_weight:
            parts["base"] = sum_over_chunks(base_loss, self.chunk_rows, *rows) / norm
        if self.sampler_weight:
            parts["sampler"] = (
                sum_over_chunks(sampler_loss, self.chunk_rows, *rows, batch.previous, trained=sampler) / norm
            )
        total = self.base_weight * parts["base"] + self.sampler_weight * parts["sampler"]
        return LossParts(total, parts)
