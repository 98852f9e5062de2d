"""Memory that a training run may need: what the estimates of all methods have in common.

An estimate is made from the model's sizes, before the first step. It counts what grows with them: weights, the
adapter with its gradients and optimizer state, the base's keys and values, activations kept for the backward pass,
and logits. It leaves out the framework itself and buffers that MLX keeps for reuse.
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

FLOAT = 4  # bytes of float32: adapter, optimizer, logits
ADAPTER_COPIES = 4  # weights, gradients, two moments of AdamW
LOGITS_COPIES = 4  # logits, their exponentials, their gradient, and one more while these are combined


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes of the largest step, over all workers.

    Attributes:
        weights: of the base model.
        adapter: what is trained, with gradients and optimizer state.
        prefix: what the forward pass of the frozen base leaves: keys and values, or hidden states.
        activations: kept for the backward pass.
        logits: of the rows whose loss is computed at once.
    """

    weights: int
    adapter: int
    prefix: int
    activations: int
    logits: int

    @property
    def total(self) -> int:
        """Sum of the parts."""
        return sum(getattr(self, field.name) for field in fields(self))

    def __str__(self) -> str:
        parts = ", ".join(f"{field.name} {gigabytes(getattr(self, field.name))}" for field in fields(self))
        return f"memory, estimated: {gigabytes(self.total)} ({parts})"


@dataclass(frozen=True)
class ModelSizes:
    """Sizes of a model that an estimate needs.

    Attributes:
        layers: number of decoder layers.
        hidden: hidden size.
        heads: attention heads.
        kv: floats of keys and values per layer and token.
        per_row: floats that a layer keeps per row for its backward pass.
        float_bytes: bytes of one float of the model.
    """

    layers: int
    hidden: int
    heads: int
    kv: int
    per_row: int
    float_bytes: int


def gigabytes(count: int) -> str:
    """A number of bytes as text, in GB or MB."""
    return f"{count / 1e9:.1f} GB" if count >= 1e8 else f"{count / 1e6:.1f} MB"


def physical_memory() -> int:
    """Bytes of this machine's memory; 0 if the system does not tell."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError, AttributeError):
        return 0


def model_sizes(attached: AttachedModel) -> ModelSizes:
    """Sizes of a model, read off the linear layers of its last decoder layer."""
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
    norms = [value for name, value in _named(layers[-1].parameters()) if "norm" in name]
    float_bytes = norms[0].itemsize if norms else FLOAT
    return ModelSizes(len(layers), attached.hidden_size, heads, kv, per_row, float_bytes)


def _base(module: nn.Module) -> nn.Module:
    return module.base if isinstance(module, GatedLinear) else module


def parameter_bytes(module: nn.Module) -> int:
    """Bytes of all parameters."""
    return sum(value.nbytes for _, value in _named(module.parameters()))


def training_bytes(module: nn.Module, workers: int) -> int:
    """Bytes of the trained parameters of `module`, with optimizer state and a gradient per worker, in float32."""
    trained = sum(value.size for _, value in _named(module.trainable_parameters()))
    return FLOAT * trained * (ADAPTER_COPIES + workers - 1)


def _named(tree: Any) -> list[tuple[str, mx.array]]:
    return cast("list[tuple[str, mx.array]]", tree_flatten(tree))


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
