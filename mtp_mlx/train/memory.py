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

from mtp_mlx.drafters.slots.adapter import SlotAdapter
from mtp_mlx.model.attach import AttachedModel
from mtp_mlx.model.gated_lora import GatedLinear, linear_sizes

FLOAT = 4  # bytes of float32: adapter, optimizer, logits
ADAPTER_COPIES = 4  # weights, gradients, two moments
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


def _nbytes(module: nn.Module) -> int:
    return sum(value.nbytes for _, value in _leaves(module.parameters()))


def _leaves(tree: Any) -> list[tuple[str, mx.array]]:
    return cast("list[tuple[str, mx.array]]", tree_flatten(tree))


def _nbytes_inside(adapter: SlotAdapter) -> int:
    """Bytes of the adapter's tensors that an attached model shows as its own."""
    inside = [*adapter.low_rank.values(), adapter.slot_module]
    return sum(_nbytes(module) for module in inside)


def too_much(
    estimate: MemoryEstimate, smaller_steps: Sequence[str], machine_bytes: int | None = None
) -> str | None:
    """A warning if the estimate exceeds the machine's memory, else None.

    Args:
        smaller_steps: names of the settings that reduce it.
        machine_bytes: the machine's memory; read off the machine if None.
    """
    have = physical_memory() if machine_bytes is None else machine_bytes
    if not have or estimate.total <= have:
        return None
    names = ", ".join(f"`{name}`" for name in smaller_steps)
    return f"this run may need {gigabytes(estimate.total)}, the machine has {gigabytes(have)}: change one of {names}"
