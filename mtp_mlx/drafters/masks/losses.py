"""Apple's objective (arXiv 2507.11851, section 3): CE of base and sampler heads on labels, plus LCM.

loss = mean over slot rows and real rows of (CE_base + CE_sampler) + lcm_weight * LCM. On real rows CE_base
is a constant of the frozen base and is left out; CE_sampler trains the sampler head there too.
LCM (Eq. 1) pulls slot latents to the detached latent of the real row that predicts the same token. The
paper's figures sum squares over the hidden size; here they are averaged over it, with a weight
(design section 4); and Eq. 1's average over the slots of one real row is kept.
"""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx

from mtp_mlx.drafters.slots.adapter import adapter_of
from mtp_mlx.model.attach import AttachedModel
from mtp_mlx.train.loss import LossParts, SlotBatch, hard_cross_entropy, soft_cross_entropy, sum_over_chunks


@dataclass(frozen=True)
class Apple:
    """Args: weight of the LCM term; rows whose logits are held at once."""

    lcm_weight: float = 1.0
    chunk_rows: int = 2048

    def __call__(self, attached: AttachedModel, batch: SlotBatch) -> LossParts:
        """See the module's formula."""
        sampler = adapter_of(attached).sampler

        def base_loss(hidden: mx.array, label: mx.array, weight: mx.array) -> mx.array:
            return mx.sum(weight * hard_cross_entropy(attached.draft_head(hidden), label))

        def sampler_loss(hidden: mx.array, label: mx.array, weight: mx.array, previous: mx.array) -> mx.array:
            refined = sampler(attached.embed(previous), hidden)
            return mx.sum(weight * hard_cross_entropy(attached.draft_head(refined), label))

        ones = mx.ones(batch.teacher_label.shape)
        norm = mx.sum(batch.weight) + ones.size
        slot_rows = (batch.hidden, batch.label, batch.weight)
        real_rows = (batch.teacher_hidden, batch.teacher_label, ones, batch.teacher_previous)
        base = sum_over_chunks(base_loss, self.chunk_rows, *slot_rows) / norm
        on_slots = sum_over_chunks(sampler_loss, self.chunk_rows, *slot_rows, batch.previous, trained=sampler)
        on_real = sum_over_chunks(sampler_loss, self.chunk_rows, *real_rows, trained=sampler)
        parts = {"base": base, "sampler": (on_slots + on_real) / norm, "lcm": latent_matching(batch)}
        total = parts["base"] + parts["sampler"] + self.lcm_weight * parts["lcm"]
        return LossParts(total, parts)


def latent_matching(batch: SlotBatch) -> mx.array:
    """LCM: mean over real rows t that have slots S(t) of 1/|S(t)| sum_{z in S(t)} mean_d (z_t - z)^2."""
    count = mx.zeros((batch.teacher_hidden.shape[0],)).at[batch.teacher_row].add(1.0)  # |S(t)|, [Q]
    anchor = mx.stop_gradient(batch.teacher_hidden[batch.teacher_row]).astype(mx.float32)
    distance = mx.mean(mx.square(batch.hidden.astype(mx.float32) - anchor), axis=-1)  # [M]
    return mx.sum(distance / count[batch.teacher_row]) / mx.sum(count > 0)


@dataclass(frozen=True)
class SelfDistil:
    """Args: weights of the two heads; rows whose logits are held at once."""

    base_weight: float = 1.0
    sampler_weight: float = 1.0
    chunk_rows: int = 2048

    def __call__(self, attached: AttachedModel, batch: SlotBatch) -> LossParts:
        """Weighted mean over the supervised rows; see the module's formula."""
        sampler = adapter_of(attached).sampler
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
