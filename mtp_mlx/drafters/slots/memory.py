"""Memory that training slots may need, estimated from the model's sizes.

Legend: T tokens of a sequence, N blocks per sequence, G blocks per chunk, R slot rows.
"""

from __future__ import annotations

from collections.abc import Sequence

from mtp_mlx.drafters.slots.adapter import SlotAdapter, adapter_of
from mtp_mlx.drafters.slots.layout import candidate_anchors
from mtp_mlx.drafters.slots.method import taught
from mtp_mlx.drafters.slots.options import SlotSettings
from mtp_mlx.drafters.slots.step import TEACHER_CHUNK, BlockChoice
from mtp_mlx.model.attach import AttachedModel
from mtp_mlx.train.data import Example
from mtp_mlx.train.memory import (
    FLOAT,
    LOGITS_COPIES,
    MemoryEstimate,
    model_sizes,
    parameter_bytes,
    training_bytes,
)


def estimate_memory(
    attached: AttachedModel,
    examples: Sequence[Example],
    settings: SlotSettings,
    choice: BlockChoice,
    workers: int = 1,
    grad_checkpoint: bool = False,
) -> MemoryEstimate:
    """Memory of the largest micro-batch of these examples, times `workers`.

    Args:
        choice: number of blocks.
        grad_checkpoint: whether layers are recomputed in the backward pass.
    """
    sizes = model_sizes(attached)
    adapter = adapter_of(attached)
    count = settings.batch_size
    length = max(len(example) for example in examples)  # T
    learnt = [taught(example, settings) for example in examples]
    blocks = max(len(candidate_anchors(len(example), example.loss_start)) for example in learnt)
    blocks = max(1, round(choice.share * blocks))
    blocks = min(blocks, choice.most) if choice.most else blocks  # N
    per_chunk = min(choice.chunk_blocks, blocks)  # G
    chunks = count * -(-blocks // per_chunk)
    keys = length + per_chunk * choice.slots
    rows = chunks * per_chunk * choice.slots  # R
    # Attention keeps scores and probabilities; every chunk has its copy of keys and values.
    layer = rows * sizes.per_row + 2 * rows * sizes.heads * keys + 2 * chunks * keys * sizes.kv
    layers = sizes.layers * layer
    if grad_checkpoint:  # activations of one layer and their gradients, and the input of every layer
        layers = 2 * layer + sizes.layers * rows * sizes.hidden
    vocabulary = attached.vocab_size
    drafted = vocabulary if adapter.draft_ids is None else len(adapter.draft_ids)
    in_loss = min(settings.loss_rows, rows) * (1 if rows > settings.loss_rows else 2)  # two heads at once
    logits = LOGITS_COPIES * in_loss * drafted + count * blocks * drafted + 2 * TEACHER_CHUNK * vocabulary
    return MemoryEstimate(
        weights=parameter_bytes(attached.model) - _bytes_inside(adapter),
        adapter=training_bytes(adapter, workers),
        prefix=workers * sizes.layers * count * length * sizes.kv * sizes.float_bytes,
        activations=workers * layers * sizes.float_bytes,
        logits=workers * logits * FLOAT,
    )


def _bytes_inside(adapter: SlotAdapter) -> int:
    """Bytes of the adapter's parameters that an attached model shows as its own."""
    return sum(parameter_bytes(module) for module in (*adapter.low_rank.values(), adapter.slot_module))
