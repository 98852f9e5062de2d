"""How much memory training slots needs: an estimate from the model's sizes."""

from __future__ import annotations

from collections.abc import Sequence

from mtp_mlx.drafters.slots.adapter import adapter_of
from mtp_mlx.drafters.slots.layout import candidate_anchors
from mtp_mlx.drafters.slots.options import SlotSettings
from mtp_mlx.drafters.slots.step import BlockChoice
from mtp_mlx.model.attach import AttachedModel
from mtp_mlx.train.data import Example
from mtp_mlx.train.memory import (
    ADAPTER_COPIES,
    FLOAT,
    LOGITS_COPIES,
    MemoryEstimate,
    _leaves,
    _nbytes,
    _nbytes_inside,
    model_sizes,
)


def estimate_memory(
    attached: AttachedModel,
    examples: Sequence[Example],
    settings: SlotSettings,
    choice: BlockChoice,
    workers: int = 1,
    grad_checkpoint: bool = False,
) -> MemoryEstimate:
    """The memory of the largest micro-batch of these examples, times `workers` in parallel.

    Args:
        choice: which positions carry a block, or how many do.
        grad_checkpoint: layers are recomputed in the backward pass.
    """
    sizes = model_sizes(attached)
    adapter = adapter_of(attached)
    count = settings.batch_size
    length = max(len(example) for example in examples)  # T
    blocks = max(len(candidate_anchors(len(example), example.loss_start)) for example in examples)
    blocks = max(1, round(choice.share * blocks))
    blocks = min(blocks, choice.most) if choice.most else blocks  # N
    per_chunk = min(choice.chunk_blocks, blocks)  # G
    chunks = count * -(-blocks // per_chunk)
    keys = length + per_chunk * choice.slots
    rows = chunks * per_chunk * choice.slots  # R
    # Attention keeps scores and probabilities, and every chunk its copy of keys and values.
    layer = rows * sizes.per_row + 2 * rows * sizes.heads * keys + 2 * chunks * keys * sizes.kv
    layers = sizes.layers * layer
    if grad_checkpoint:  # one layer's and their gradients, and every layer's input
        layers = 2 * layer + sizes.layers * rows * sizes.hidden
    vocabulary = attached.vocab_size
    drafted = vocabulary if adapter.draft_ids is None else len(adapter.draft_ids)
    in_loss = min(settings.loss_rows, rows) * (1 if rows > settings.loss_rows else 2)  # two heads at once
    logits = LOGITS_COPIES * in_loss * drafted + count * blocks * drafted + 2 * 512 * vocabulary
    trained = sum(value.size for _, value in _leaves(adapter.trainable_parameters()))
    return MemoryEstimate(
        weights=_nbytes(attached.model) - _nbytes_inside(adapter),
        adapter=FLOAT * trained * (ADAPTER_COPIES + workers - 1),
        prefix=workers * sizes.layers * count * length * sizes.kv * sizes.float_bytes,
        activations=workers * layers * sizes.float_bytes,
        logits=workers * logits * FLOAT,
    )
