"""How much memory a training run will need: an estimate from the model's sizes, made before the first step.

Counted are the things that grow: weights, the adapter with its gradients and optimizer state, the base's KV,
what the slot pass keeps for its backward pass, and logits. Not counted: the framework itself, and buffers
that MLX keeps for re-use.

Legend: S sequences, T tokens, N blocks per sequence, k slots, G blocks per chunk, R slot rows, D hidden size.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from mtp_mlx.model.attach import AttachedModel
from mtp_mlx.model.gated_lora import GatedLinear, linear_sizes
from mtp_mlx.model.slot_adapter import SlotAdapter
from mtp_mlx.train.data import Example
from mtp_mlx.train.settings import TrainSettings
from mtp_mlx.train.slot_layout import candidate_anchors

FLOAT = 4  # bytes of float32: adapter, optimizer, logits
ADAPTER_COPIES = 4  # weights, gradients, two moments
SMALLER_STEPS = "lower --batch-size, --max-length, --block-share or --loss-rows, or use --grad-checkpoint"
LOGITS_COPIES = 4  # logits, their exponentials, gradient, one more while they are combined


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes at the worst step; everything but `weights` and `adapter` for all workers together."""

    weights: int
    adapter: int
    prefix: int
    activations: int
    logits: int

    @property
    def total(self) -> int:
        """All of it."""
        return sum(getattr(self, field.name) for field in fields(self))

    def __str__(self) -> str:
        parts = ", ".join(f"{field.name} {gigabytes(getattr(self, field.name))}" for field in fields(self))
        return f"memory, estimated: {gigabytes(self.total)} ({parts})"


@dataclass(frozen=True)
class ModelSizes:
    """What the estimate needs to know of a model. `per_row`: floats one layer keeps for one row."""

    layers: int
    hidden: int
    heads: int
    kv: int
    per_row: int
    float_bytes: int


def gigabytes(count: int) -> str:
    """Bytes for people."""
    return f"{count / 1e9:.1f} GB" if count >= 1e8 else f"{count / 1e6:.1f} MB"


def physical_memory() -> int:
    """Bytes of this machine's memory, 0 if it does not say."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError, AttributeError):
        return 0


def model_sizes(attached: AttachedModel) -> ModelSizes:
    """Sizes of the model at hand, read off its linear layers."""
    layers = attached.model.layers
    widths = [
        (name.rsplit(".", 1)[-1], *linear_sizes(_base(module)))
        for name, module in layers[-1].named_modules()
        if isinstance(_base(module), nn.Linear | nn.QuantizedLinear) and not name.endswith(".base")
    ]
    attention = getattr(layers[-1], "self_attn", layers[-1])
    heads = int(getattr(attention, "n_heads", 0) or getattr(attention, "num_heads", 0))
    kv = sum(size for name, _, size in widths if name in ("k_proj", "v_proj")) or 2 * attached.hidden_size
    # Every linear keeps its input and output; norms, residuals and rotations about six hidden vectors more.
    per_row = sum(inputs + 2 * outputs for _, inputs, outputs in widths) + 6 * attached.hidden_size
    norms = [value for name, value in _leaves(layers[-1].parameters()) if "norm" in name]
    float_bytes = norms[0].itemsize if norms else FLOAT
    return ModelSizes(len(layers), attached.hidden_size, heads, kv, per_row, float_bytes)


def _base(module: nn.Module) -> nn.Module:
    return module.base if isinstance(module, GatedLinear) else module


def estimate_memory(
    attached: AttachedModel, examples: Sequence[Example], settings: TrainSettings, workers: int = 1
) -> MemoryEstimate:
    """The memory of the largest micro-batch the examples can give, times `workers` side by side."""
    sizes = model_sizes(attached)
    adapter = attached.adapter
    assert adapter is not None
    count = settings.batch_size
    length = max(len(example) for example in examples)  # T
    blocks = max(len(candidate_anchors(len(example), example.loss_start)) for example in examples)
    blocks = max(1, round(settings.block_share * blocks))
    blocks = min(blocks, settings.max_blocks) if settings.max_blocks else blocks  # N
    per_chunk = min(settings.chunk_blocks, blocks)  # G
    chunks = count * -(-blocks // per_chunk)
    keys = length + per_chunk * settings.slots
    rows = chunks * per_chunk * settings.slots  # R
    # Attention keeps scores and probabilities, and every chunk its copy of keys and values.
    layer = rows * sizes.per_row + 2 * rows * sizes.heads * keys + 2 * chunks * keys * sizes.kv
    layers = sizes.layers * layer
    if settings.grad_checkpoint:  # one layer's and their gradients, and every layer's input
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


def estimate_heads_memory(
    attached: AttachedModel, examples: Sequence[Example], settings: TrainSettings, workers: int = 1
) -> MemoryEstimate:
    """The memory of training MTP heads on the largest micro-batch the examples can give, times `workers`.

    `prefix` is the trunk's pass, of which one layer is in memory at a time.
    """
    sizes, heads = model_sizes(attached), attached.mtp_heads
    assert heads is not None
    depths = len(heads.heads)
    length = max(len(example) for example in examples)  # T
    responses = max(len(example) - example.loss_start for example in examples)
    rows, supervised = settings.batch_size * length, settings.batch_size * min(responses, length)
    layer = rows * sizes.per_row + 2 * rows * sizes.heads * length
    columns = attached.draft_head.columns
    kept = round(settings.top_share * columns) if settings.kl_weight else 0
    in_loss = min(settings.loss_rows, supervised * depths)
    logits = LOGITS_COPIES * (in_loss + 256) * columns + 2 * supervised * kept
    trained = sum(value.size for _, value in _leaves(heads.trainable_parameters()))
    # The fuse layer's inputs and what the LM head reads come on top of a decoder layer's own.
    activations = depths * (layer + 6 * rows * sizes.hidden)
    return MemoryEstimate(
        weights=_nbytes(attached.model),
        adapter=FLOAT * trained * (ADAPTER_COPIES + workers - 1),
        prefix=workers * 2 * layer * sizes.float_bytes,
        activations=workers * activations * FLOAT,
        logits=workers * logits * FLOAT,
    )


def _nbytes(module: nn.Module) -> int:
    return sum(value.nbytes for _, value in _leaves(module.parameters()))


def _leaves(tree: Any) -> list[tuple[str, mx.array]]:
    return cast("list[tuple[str, mx.array]]", tree_flatten(tree))


def _nbytes_inside(adapter: SlotAdapter) -> int:
    """Bytes of the adapter's tensors that an attached model shows as its own."""
    inside = [*adapter.low_rank.values(), adapter.slot_module]
    return sum(_nbytes(module) for module in inside)


def too_much(
    estimate: MemoryEstimate, machine_bytes: int | None = None, remedy: str = SMALLER_STEPS
) -> str | None:
    """A warning with the way out if the estimate exceeds the machine's memory, else None."""
    have = physical_memory() if machine_bytes is None else machine_bytes
    if not have or estimate.total <= have:
        return None
    return f"this run may need {gigabytes(estimate.total)}, the machine has {gigabytes(have)}: {remedy}"
