"""The two objectives of mask tokens; which one is `MaskTokenSettings.objective`.

self-distill: slots learn the base model's own next-token distribution, some tokens early.

    loss = weighted mean over slot rows of CE(teacher, base head) + CE(teacher, sampler head)

    The teacher is the frozen base at the real row that predicts the same token; targets are its probabilities.

apple (arXiv 2507.11851, section 3): slots learn the text.

    loss = mean over slot rows and real rows of (CE_base + CE_sampler) + lcm_weight * LCM

    On real rows CE_base is a constant of the frozen base and is left out, while CE_sampler trains the sampler head
    there too. LCM (Eq. 1) pulls the hidden state of a slot to that of the real row that predicts the same token,
    which is a constant. The paper's figures sum its squares over the hidden size; here they are averaged, and the
    term has a weight (design section 4). Eq. 1's average over the slots of a real row is kept.

In both, the sampler head is given the label before the predicted token as its previous token.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import mlx.core as mx

from mtp_mlx.drafters.slots.adapter import adapter_of
from mtp_mlx.model.attach import AttachedModel
from mtp_mlx.train.loss import LossParts, hard_cross_entropy, soft_cross_entropy, sum_over_chunks


@dataclass(frozen=True)
class SlotBatch:
    """Supervised rows of a micro-batch: M slot rows, Q teacher rows, D hidden size, C columns of the draft head.

    Attributes:
        hidden: [M, D] hidden states of the slots after the final norm; carries gradients.
        depth: [M] int32 slot, from 1.
        weight: [M] float32 weight of the row's loss.
        teacher_row: [M] int32 index of the teacher row, the real row that predicts the same token.
        previous: [M] int32 token before the predicted one.
        label: [M] int32 column of the token that followed, -1 if it is outside the draft vocabulary.
        teacher_hidden: [Q, D] hidden states of the base; constants.
        teacher_probs: [Q, C] the base's probabilities of the draft columns, of a sum up to 1; constants.
        teacher_previous: [Q] int32 token at each teacher row.
        teacher_label: [Q] int32 column of the token after it, -1 if it is outside the draft vocabulary.
    """

    hidden: mx.array
    depth: mx.array
    weight: mx.array
    teacher_row: mx.array
    previous: mx.array
    label: mx.array
    teacher_hidden: mx.array
    teacher_probs: mx.array
    teacher_previous: mx.array
    teacher_label: mx.array


class Objective(Protocol):
    """Computes the loss of a batch."""

    def __call__(self, attached: AttachedModel, batch: SlotBatch) -> LossParts: ...


@dataclass(frozen=True)
class Apple:
    """The objective `apple`; see the module.

    Attributes:
        lcm_weight: weight of latent consistency matching.
        chunk_rows: rows whose logits are in memory at once.
    """

    lcm_weight: float = 1.0
    chunk_rows: int = 2048

    def __call__(self, attached: AttachedModel, batch: SlotBatch) -> LossParts:
        """Loss with the parts "base", "sampler" and "lcm"."""
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
    """LCM: mean over real rows t with slots S(t) of 1/|S(t)| sum_{z in S(t)} mean_d (z_t - z)^2, a scalar."""
    count = mx.zeros((batch.teacher_hidden.shape[0],)).at[batch.teacher_row].add(1.0)  # |S(t)|, [Q]
    anchor = mx.stop_gradient(batch.teacher_hidden[batch.teacher_row]).astype(mx.float32)
    distance = mx.mean(mx.square(batch.hidden.astype(mx.float32) - anchor), axis=-1)  # [M]
    return mx.sum(distance / count[batch.teacher_row]) / mx.sum(count > 0)


@dataclass(frozen=True)
class SelfDistil:
    """The objective `self-distill`; see the module.

    Attributes:
        base_weight, sampler_weight: weights of the two heads' losses.
        chunk_rows: rows whose logits are in memory at once.
    """

    base_weight: float = 1.0
    sampler_weight: float = 1.0
    chunk_rows: int = 2048

    def __call__(self, attached: AttachedModel, batch: SlotBatch) -> LossParts:
        """Loss with the parts "base" and "sampler"."""
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
