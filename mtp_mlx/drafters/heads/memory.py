"""Memory that training MTP heads may need, estimated from the model's sizes."""

from __future__ import annotations

from collections.abc import Sequence

from mtp_mlx.drafters.heads.draft_heads import heads_of
from mtp_mlx.drafters.heads.options import HeadsSettings
from mtp_mlx.model.attach import AttachedModel
from mtp_mlx.train.data import Example
from mtp_mlx.train.memory import (
    FLOAT,
    LOGITS_COPIES,
    MemoryEstimate,
    beside,
    model_sizes,
    parameter_bytes,
    training_bytes,
)
from mtp_mlx.train.plan import StepPlan


def estimate_heads_memory(
    attached: AttachedModel, examples: Sequence[Example], settings: HeadsSettings, plan: StepPlan
) -> MemoryEstimate:
    """Memory of the largest micro-batch of these examples, times the plan's workers.

    `prefix` is the pass of the frozen trunk, of which one layer is in memory at a time.
    """
    sizes, heads = model_sizes(attached), heads_of(attached)
    depths, layers = heads.drafts, len(heads.heads[0].layers)
    length = max(len(example) for example in examples)  # T
    responses = max(len(example) - example.loss_start for example in examples)
    count = settings.batch_size if plan.slice_rows is None else max(1, plan.slice_rows // length)
    rows, supervised = count * length, count * min(responses, length)
    layer = rows * sizes.per_row + 2 * rows * sizes.heads * length
    columns = attached.draft_head.columns
    kept = round(settings.top_share * columns) if settings.kl_weight else 0
    in_loss = min(settings.loss_rows, supervised * depths)
    logits = LOGITS_COPIES * (in_loss + 256) * columns + 2 * supervised * kept
    # In addition to a decoder layer's own: the inputs of `fuse` and of the LM head.
    activations = depths * (layers * layer + 6 * rows * sizes.hidden) + 2 * rows * attached.trained_on_size
    workers, weights = plan.workers, parameter_bytes(attached.model)
    return MemoryEstimate(
        process=beside(weights),
        weights=weights,
        adapter=training_bytes(heads, workers, settings.ema > 0),
        prefix=workers * 2 * layer * sizes.float_bytes,
        activations=workers * activations * FLOAT,
        logits=workers * logits * FLOAT,
    )
