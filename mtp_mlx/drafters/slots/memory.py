"""Memory that training slots may need, estimated from the model's sizes.

Legend: T tokens of a sequence, N blocks per sequence, G blocks per chunk, R slot rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from mtp_mlx.drafters.slots.adapter import SlotAdapter, adapter_of
from mtp_mlx.drafters.slots.layout import candidate_anchors
from mtp_mlx.drafters.slots.options import SlotSettings
from mtp_mlx.drafters.slots.step import TEACHER_CHUNK, BlockChoice, taught
from mtp_mlx.model.attach import AttachedModel
from mtp_mlx.train.data import Example
from mtp_mlx.train.memory import (
    FLOAT,
    LOGITS_COPIES,
    MemoryEstimate,
    ModelSizes,
    RecurrentSizes,
    beside,
    model_sizes,
    parameter_bytes,
    recurrent_sizes,
    training_bytes,
)
from mtp_mlx.train.plan import StepPlan, sliced_plans

SCORES = 1.2  # copies of the scores of attention that are kept, measured
ALLOCATED = 1.15  # times what is kept for the backward pass, measured
STATES = 2.0  # copies of a block's recurrent states that are kept, measured
STEP_STATES = 2.0, 2.5  # further copies where a layer goes row by row: per block, and per row of it


def estimate_memory(
    attached: AttachedModel,
    examples: Sequence[Example],
    settings: SlotSettings,
    choice: BlockChoice,
    plan: StepPlan,
) -> MemoryEstimate:
    """Memory of the largest slice of these examples, times the plan's workers.

    Args:
        choice: number of blocks.
        plan: slices, workers, and whether layers are recomputed in the backward pass.
    """
    sizes = model_sizes(attached)
    adapter = adapter_of(attached)
    count = settings.batch_size
    length = max(len(example) for example in examples)  # T
    learnt = [taught(example, settings) for example in examples]
    blocks = max(len(candidate_anchors(len(example), example.loss_start)) for example in learnt)
    blocks = max(1, round(choice.share * blocks))
    blocks = min(blocks, choice.most) if choice.most else blocks  # N
    blocks = max(1, round(blocks * choice.mean_slots / choice.slots))  # as many of k slots
    per_chunk = min(chunk_blocks_of(choice.chunk_blocks, choice.slots, plan), blocks)  # G
    rows_of_chunk = per_chunk * choice.slots
    chunks = -(-blocks // per_chunk)
    if plan.slice_rows is not None:
        chunks = min(chunks, max(1, plan.slice_rows // rows_of_chunk))
    keys, rows = length + rows_of_chunk, chunks * rows_of_chunk
    recurrent = recurrent_sizes(attached)
    # Attention keeps its probabilities; every chunk has its copy of keys and values.
    attention = SCORES * rows * sizes.heads * keys + chunks * keys * sizes.kv
    layer = rows * sizes.per_row + attention
    layers = sizes.layers * round(layer)
    if recurrent is not None:
        layers = round(sizes.layers * rows * recurrent.per_row + recurrent.attention * attention)
    if plan.grad_checkpoint:  # activations of one layer and their gradients, and the input of every layer
        layers = 2 * round(layer) + sizes.layers * rows * sizes.hidden
    vocabulary = attached.vocab_size
    drafted = vocabulary if adapter.draft_ids is None else len(adapter.draft_ids)
    in_loss = min(settings.loss_rows, rows) * (1 if rows > settings.loss_rows else 2)  # two heads at once
    in_chunk = rows_of_chunk / choice.mean_slots  # blocks
    states = _states(recurrent, round(chunks * in_chunk), choice.slots, plan) if recurrent else 0
    teachers = min(chunks * round(in_chunk + choice.slots), length)  # teacher rows of a slice
    logits = LOGITS_COPIES * in_loss * drafted + teachers * drafted
    # Pass 1 and the teacher come before pass 2, so they need no memory of their own.
    first_pass = count * length * sizes.per_row + 3 * count * sizes.heads * length**2
    teacher = 3 * min(TEACHER_CHUNK, teachers) * vocabulary
    kept = round(ALLOCATED * (layers * sizes.float_bytes + states + logits * FLOAT))
    activations = max(kept, first_pass * sizes.float_bytes, teacher * FLOAT)
    weights = parameter_bytes(attached.model) - _bytes_inside(adapter)
    workers = plan.workers
    return MemoryEstimate(
        process=beside(weights),
        weights=weights,
        adapter=training_bytes(adapter, workers, settings.ema > 0),
        prefix=workers * count * length * _prefix(sizes, recurrent),
        activations=workers * (activations - logits * FLOAT),
        logits=workers * logits * FLOAT,
    )


def _states(sizes: RecurrentSizes, blocks: int, slots: int, plan: StepPlan) -> int:
    """Bytes of recurrent state that so many blocks of a slice keep for their backward pass."""
    a_block, a_row = STEP_STATES
    stepped = sizes.row_by_row * (a_block + a_row * (slots + 1))
    if plan.grad_checkpoint:  # of one layer, and what all of them start from
        return round(blocks * (sizes.state + (STATES * sizes.state + 2 * stepped) / sizes.layers))
    return round(blocks * (STATES * sizes.state + stepped))


def _prefix(sizes: ModelSizes, recurrent: RecurrentSizes | None) -> int:
    """Bytes that pass 1 leaves of every token: keys and values, and what recurrent states are made from."""
    keys_and_values = sizes.kv * sizes.float_bytes
    if recurrent is None:
        return sizes.layers * keys_and_values
    return recurrent.attention * keys_and_values + recurrent.recorded


def chunk_blocks_of(most: int, slots: int, plan: StepPlan) -> int:
    """Blocks of a chunk: at most `most`, and no more than fit a slice."""
    return most if plan.slice_rows is None else min(most, max(1, plan.slice_rows // slots))


def block_plans(settings: SlotSettings, workers: int, most_rows: int) -> Iterator[StepPlan]:
    """Plans of a method of slots, fastest first; a slice has one chunk of blocks at least."""
    return sliced_plans(workers, most_rows, settings.grad_checkpoint, settings.slots)


def _bytes_inside(adapter: SlotAdapter) -> int:
    """Bytes of the adapter's parameters that an attached model shows as its own."""
    return sum(parameter_bytes(module) for module in (*adapter.low_rank.values(), adapter.slot_module))
