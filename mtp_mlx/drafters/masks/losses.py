"""The two objectives of mask tokens; which one is `MaskTokenSettings.objective`.

self-distill: slots learn the base model's own next-token distribution, some tokens early.

    loss = weighted mean over slot rows of CE(teacher, base head) + CE(teacher, sampler head), + lcm_weight * LCM

    The teacher is the frozen base at the real row that predicts the same token; targets are its probabilities.

apple (arXiv 2507.11851, section 3): slots learn the text.

    loss = mean over slot rows and real rows of (CE_base + CE_sampler) + lcm_weight * LCM

    On real rows CE_base is a constant of the frozen base and is left out, while CE_sampler trains the sampler head
    there too.

In both, the sampler head is given the label before the predicted token as its previous token, and LCM (Eq. 1) pulls
the hidden state of a slot to that of the real row that predicts the same token, which is a constant. The paper's
figures sum its squares over the hidden size, which makes its weight depend on the model; here they are averaged, and
divided by the mean square of the constant (design section 4). Eq. 1's average over the slots of a real row is kept.

A micro-batch is computed in slices, whose losses add up: all means are over the micro-batch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import mlx.core as mx

from mtp_mlx.drafters.slots.adapter import adapter_of
from mtp_mlx.model.attach import AttachedModel
from mtp_mlx.train.loss import LossParts, hard_cross_entropy, soft_cross_entropy, sum_over_chunks

SMALLEST_SQUARE = 1e-6  # of a hidden state that distances are divided by


@dataclass(frozen=True)
class SlotBatch:
    """Supervised rows of a slice: m slot rows, Q teacher rows, D hidden size, C columns of the draft head.

    Attributes:
        hidden: [m, D] hidden states of the slots after the final norm; carries gradients.
        weight: [m] float32 weight of the row's loss.
        matching: [m] float32 weight of the row in LCM.
        teacher_row: [m] int32 index of the teacher row, the real row that predicts the same token.
        previous: [m] int32 token before the predicted one.
        label: [m] int32 column of the token that followed, -1 if it is outside the draft vocabulary.
        teacher_hidden: [Q, D] hidden states of the base; constants.
        teacher_probs: [Q, C] the base's probabilities of the draft columns, of a sum up to 1; constants.
        teacher_previous: [Q] int32 token at each teacher row.
        teacher_label: [Q] int32 column of the token after it, -1 if it is outside the draft vocabulary.
        real: [q] int32 the teacher rows that no slice before has: each has a loss of its own once in a micro-batch.
        weight_sum: of the weights of all slot rows of the micro-batch.
        real_count: number of teacher rows of the micro-batch.
    """

    hidden: mx.array
    weight: mx.array
    matching: mx.array
    teacher_row: mx.array
    previous: mx.array
    label: mx.array
    teacher_hidden: mx.array
    teacher_probs: mx.array
    teacher_previous: mx.array
    teacher_label: mx.array
    real: mx.array
    weight_sum: float
    real_count: int


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

        norm = batch.weight_sum + batch.real_count
        slot_rows = (batch.hidden, batch.label, batch.weight)
        base = sum_over_chunks(base_loss, self.chunk_rows, *slot_rows) / norm
        on_sampler = sum_over_chunks(
            sampler_loss, self.chunk_rows, *slot_rows, batch.previous, trained=sampler
        )
        if batch.real.size:
            label, previous = batch.teacher_label[batch.real], batch.teacher_previous[batch.real]
            real_rows = (batch.teacher_hidden[batch.real], label, mx.ones(label.shape), previous)
            on_sampler += sum_over_chunks(sampler_loss, self.chunk_rows, *real_rows, trained=sampler)
        parts = {"base": base, "sampler": on_sampler / norm, "lcm": latent_matching(batch)}
        total = parts["base"] + parts["sampler"] + self.lcm_weight * parts["lcm"]
        return LossParts(total, parts)


def latent_matching(batch: SlotBatch) -> mx.array:
    """A slice's share of LCM, a scalar; z_t is the hidden state of real row t, a constant, S(t) its slots.

    LCM = mean over real rows t with slots of 1/|S(t)| sum_{z in S(t)} mean_d (z_t - z)^2 / mean_d z_t^2
    """
    anchor = mx.stop_gradient(batch.teacher_hidden[batch.teacher_row]).astype(mx.float32)
    distance = mx.mean(mx.square(batch.hidden.astype(mx.float32) - anchor), axis=-1)  # [m]
    size = mx.maximum(mx.mean(mx.square(anchor), axis=-1), SMALLEST_SQUARE)
    return mx.sum(batch.matching * distance / size)


@dataclass(frozen=True)
class SelfDistil:
    """The objective `self-distill`; see the module.

    Attributes:
        base_weight, sampler_weight: weights of the two heads' losses.
        lcm_weight: weight of latent consistency matching.
        chunk_rows: rows whose logits are in memory at once.
    """

    base_weight: float = 1.0
    sampler_weight: float = 1.0
    lcm_weight: float = 0.0
    chunk_rows: int = 2048

    def __call__(self, attached: AttachedModel, batch: SlotBatch) -> LossParts:
        """Loss with the parts "base" and "sampler", and "lcm" if it has a weight."""
        sampler = adapter_of(attached).sampler
        norm = batch.weight_sum

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
        if self.lcm_weight:
            parts["lcm"] = latent_matching(batch)
            total += self.lcm_weight * parts["lcm"]
        return LossParts(total, parts)
