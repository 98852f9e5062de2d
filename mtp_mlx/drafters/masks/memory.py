"""Memory that training a mask token by online self-distillation needs, estimated from the model's sizes.

Legend: B sequences of a micro-batch, S rows of a joint pass over one of them, k tokens that a region predicts,
V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from mtp_mlx.drafters.masks.options import ConfAdaptSettings
from mtp_mlx.drafters.masks.regions import real_tokens, regions_over
from mtp_mlx.drafters.slots.memory import SCORES, chunk_blocks_of, estimate_memory
from mtp_mlx.drafters.slots.step import BlockChoice
from mtp_mlx.model.attach import AttachedModel
from mtp_mlx.train.data import Example
from mtp_mlx.train.memory import FLOAT, LOGITS_COPIES, MemoryEstimate, model_sizes
from mtp_mlx.train.plan import StepPlan

STATE_OF_FULL = (
    4  # of every weight of a full fine-tune: gradient, two moments, and the frozen one of the teacher
)


def online_memory(
    attached: AttachedModel, examples: Sequence[Example], settings: ConfAdaptSettings, plan: StepPlan
) -> MemoryEstimate:
    """Memory of a step with gated LoRA: slices of masks, and the teacher's logits of the rows that the loss takes."""
    region_rows = settings.region_rows or 0
    regions = BlockChoice(
        slots=settings.slots,
        share=1 / real_tokens(settings.slots + 1, region_rows),
        chunk_blocks=chunk_blocks_of(settings.chunk_blocks, settings.slots, plan),
    )
    estimate = estimate_memory(attached, examples, settings, regions, plan)
    rows = settings.loss_rows if plan.slice_rows is None else min(settings.loss_rows, plan.slice_rows)
    teacher = plan.workers * 2 * rows * attached.vocab_size * FLOAT
    return replace(estimate, logits=estimate.logits + teacher)


def joint_memory(
    attached: AttachedModel, examples: Sequence[Example], settings: ConfAdaptSettings
) -> MemoryEstimate:
    """Memory of a step whose real rows are trained too: one pass over all regions of all texts of a micro-batch."""
    sizes, count = model_sizes(attached), settings.batch_size
    region_rows, k = settings.region_rows or 0, settings.slots + 1
    regions = regions_over(max(len(example) for example in examples), k, 0, region_rows)
    rows = count * regions * region_rows  # B * S
    layer = rows * sizes.per_row + SCORES * rows * sizes.heads * regions * region_rows + rows * sizes.kv
    predicted = count * regions * k
    logits = (LOGITS_COPIES * min(settings.loss_rows, predicted) + 2 * predicted) * attached.vocab_size
    base = online_memory(attached, examples, settings, StepPlan(1))
    state = base.adapter
    if settings.tuning == "full":
        state += (STATE_OF_FULL + (settings.ema > 0)) * base.weights
    return replace(
        base,
        adapter=state,
        prefix=0,
        activations=sizes.layers * round(layer) * sizes.float_bytes,
        logits=logits * FLOAT,
    )
