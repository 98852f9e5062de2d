"""Memory: what a training run may use, and what it will need, as the estimates of all methods have in common.

An estimate is made from the model's sizes, before the first step. It counts what grows with them: weights, the
adapter with its gradients and optimizer state, the base's keys and values, activations kept for the backward pass,
and logits; and what the process has in memory already besides the weights.
"""

from __future__ import annotations

import os
import re
import socket
import sys
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from mtp_mlx.distributed import Peers
from mtp_mlx.errors import MTPError
from mtp_mlx.model.attach import AttachedModel
from mtp_mlx.model.block import Block
from mtp_mlx.model.cache import prefix_caches
from mtp_mlx.model.gated_lora import linear_sizes
from mtp_mlx.model.precision import bare
from mtp_mlx.model.seams import cache_leaves
from mtp_mlx.model.text_states import TextStates

FLOAT = 4  # bytes of float32: adapter, optimizer, logits
ADAPTER_COPIES = 4  # weights, gradients, two moments of AdamW
LOGITS_COPIES = 4  # logits, their exponentials, their gradient, and one more while these are combined


SHARE_OF_GPU = 0.9  # of the memory of a GPU that has its own
SHARE = 0.6  # of a machine's memory that training takes by default, where Metal does not recommend a size
UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}
CGROUP = Path("/sys/fs/cgroup")


@dataclass(frozen=True)
class MemoryBudget:
    """What a run may use.

    Attributes:
        bytes: the budget.
        source: where it comes from, as part of a sentence.
    """

    bytes: int
    source: str

    def __str__(self) -> str:
        return f"{self.source} {gigabytes(self.bytes)}"


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes of the largest step, over all workers.

    Attributes:
        process: what the process has in memory already, without the weights.
        weights: of the base model.
        adapter: what is trained, with gradients and optimizer state.
        prefix: what the forward pass of the frozen base leaves: keys and values, or hidden states.
        activations: kept for the backward pass.
        logits: of the rows whose loss is computed at once.
    """

    process: int
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

    Of a model with layers of several kinds, these are the sizes of the last layer with keys and values.
    """

    layers: int
    hidden: int
    heads: int
    kv: int
    per_row: int
    float_bytes: int


@dataclass(frozen=True)
class RecurrentSizes:
    """Sizes of a model's recurrent layers.

    Attributes:
        layers: number of them.
        attention: number of layers with keys and values.
        per_row: floats that a layer of the model keeps per row for its backward pass, the mean over all layers.
        recorded: bytes per token that pass 1 records for states at places of a text.
        state: bytes of the states of one sequence, of all layers together.
        row_by_row: bytes of those whose layers go through a pass row by row.
    """

    layers: int
    attention: int
    per_row: int
    recorded: int
    state: int
    row_by_row: int


def gigabytes(count: int) -> str:
    """A number of bytes as text, in GB or MB."""
    return f"{count / 1e9:.1f} GB" if count >= 1e8 else f"{count / 1e6:.1f} MB"


def memory_budget(memory: str | None) -> MemoryBudget:
    """The budget that `memory` names, as in "12GB"; by default what Metal recommends, or a share of the machine's.

    Raises:
        MTPError: `memory` is no size, or more than the machine has.
    """
    have = _memory_of_gpu() or machine_memory()
    if memory is not None:
        given = parsed_size(memory)
        if have and given > have:
            raise MTPError(
                f"`memory` is {gigabytes(given)}, and the machine has {gigabytes(have)}: give less"
            )
        return MemoryBudget(given, "`memory` allows")
    recommended = _recommended_by_metal()
    if recommended:
        return MemoryBudget(recommended, "Metal recommends at most")
    on_gpu = _memory_of_gpu()
    if on_gpu:
        return MemoryBudget(
            int(SHARE_OF_GPU * on_gpu), f"training takes at most {SHARE_OF_GPU:.0%} of the GPU's,"
        )
    if have:
        return MemoryBudget(
            int(SHARE * have), f"training takes at most {SHARE:.0%} of {gigabytes(have)}, which is"
        )
    return MemoryBudget(sys.maxsize, "the system does not tell its memory, so the budget is")


def memory_of_one(memory: str | None, peers: Peers) -> str | None:
    """The `memory` of each process: as given, or by default an even share of what those on one machine have.

    Raises:
        MTPError: another process is lost.
    """
    if memory is not None or peers.alone:
        return memory
    here = peers.gather(socket.gethostname()).count(socket.gethostname())
    return f"{memory_budget(None).bytes // here}B" if here > 1 else None


def check_weights(folder: Path, budget: MemoryBudget) -> None:
    """Refuses a model whose weights alone exceed the budget, before they are read.

    Raises:
        MTPError: they do.
    """
    size = sum(path.stat().st_size for path in folder.glob("model*.safetensors"))  # what mlx-lm reads
    if size > budget.bytes:
        raise MTPError(
            f"{folder.name} cannot be trained on: its weights alone take {gigabytes(size)}, and {budget}; take a "
            "smaller or quantised model"
        )


def parsed_size(text: str) -> int:
    """Bytes of a size such as "2GB", "1.5g" or "800MB", never without a unit; units are powers of 1000.

    Raises:
        MTPError: it is none.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(?=[kmgtb])([kmgt]?)i?b?\s*", text.lower())
    size = float(found[1]) * UNITS[found[2]] if found else 0
    if not found or size < 1:
        raise MTPError(f"`memory` must be a size such as 12GB or 800MB, not {text!r}")
    return int(size)


def machine_memory() -> int:
    """Bytes of memory that this process can have, the machine's or its container's; 0 if the system tells neither."""
    sizes = [size for size in (physical_memory(), container_limit()) if size]
    return min(sizes, default=0)


def physical_memory() -> int:
    """Bytes of this machine's memory; 0 if the system does not tell."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError, AttributeError):
        return 0


def container_limit(root: Path = CGROUP, own: Path = Path("/proc/self/cgroup")) -> int:
    """The smallest memory limit of the process's control groups (Linux, version 1 or 2), in bytes; 0 if none.

    Args:
        root: where control groups are mounted.
        own: the file that names those of the process.
    """
    try:
        lines = own.read_text().splitlines()
    except OSError:
        return 0
    limits = []
    for line in lines:
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if controllers and "memory" not in controllers.split(","):
            continue
        base, name = (root / "memory", "memory.limit_in_bytes") if controllers else (root, "memory.max")
        folder = base / path.lstrip("/")
        for place in (folder, *folder.parents):
            if place == base.parent:
                break
            limits.append(_limit(place / name))
        limits.append(_limit(base / name))  # inside a container, the path may be that of the host
    return min((limit for limit in limits if limit), default=0)


def _limit(path: Path) -> int:
    try:
        value = int(path.read_text())
    except (OSError, ValueError):  # no such file, or "max"
        return 0
    return value if value < 2**60 else 0  # version 1 writes a huge number for none


def resident_memory() -> int:
    """Bytes of this process in memory now (on macOS at most so far); 0 if the system does not tell."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, IndexError):
        return peak_memory()


def peak_memory() -> int:
    """Most bytes that this process has had in memory, a GPU's own included; 0 if the system does not tell."""
    try:
        import resource
    except ImportError:  # Windows
        return 0
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return most if mx.default_device() == mx.Device(mx.cpu) else max(most, mx.get_peak_memory())


def _memory_of_gpu() -> int:
    """Bytes of a GPU that has memory of its own; 0 without one, or if MLX does not tell."""
    if mx.default_device() == mx.Device(mx.cpu) or mx.metal.is_available():
        return 0
    told = cast("dict[str, Any]", mx.device_info())
    return int(told.get("total_memory", 0) or told.get("memory_size", 0))


def _recommended_by_metal() -> int:
    """Bytes of the working set that Metal recommends; 0 without Metal."""
    if not mx.metal.is_available():
        return 0
    return int(cast("dict[str, Any]", mx.device_info()).get("max_recommended_working_set_size", 0))


def model_sizes(attached: AttachedModel) -> ModelSizes:
    """Sizes of a model, read off the linear layers of a decoder layer: the last one with keys and values."""
    layers = attached.model.layers
    last = next((layer for layer in reversed(layers) if _has_keys(layer)), layers[-1])
    widths = _widths(last)
    attention = next((last[name] for name in ("self_attn", "mixer") if name in last), last)
    heads = int(getattr(attention, "n_heads", 0) or getattr(attention, "num_heads", 0))
    kv = sum(size for name, _, size in widths if name in ("k_proj", "v_proj")) or 2 * attached.hidden_size
    per_row = _per_row(widths, attached.hidden_size)
    norms = [value for name, value in _named(last.parameters()) if "norm" in name]
    float_bytes = norms[0].itemsize if norms else FLOAT
    return ModelSizes(len(layers), attached.hidden_size, heads, kv, per_row, float_bytes)


def recurrent_sizes(attached: AttachedModel) -> RecurrentSizes | None:
    """Sizes of a model's recurrent layers, from a pass that is never evaluated; None if it has none."""
    if not attached.why_linear:
        return None
    caches = prefix_caches(attached.model)
    attached.forward(Block.real(mx.zeros((1, 1), dtype=mx.int32)), caches)
    leaves = cache_leaves(caches)
    found = [leaf for _, leaf in leaves if isinstance(leaf, TextStates)]
    layers = attached.model.layers
    return RecurrentSizes(
        layers=len({index for index, leaf in leaves if isinstance(leaf, TextStates)}),
        attention=len({index for index, leaf in leaves if not isinstance(leaf, TextStates)}),
        per_row=sum(_per_row(_widths(layer), attached.hidden_size) for layer in layers) // len(layers),
        recorded=sum(array.nbytes for leaf in found for array in leaf.arrays()),
        state=sum(leaf.nbytes for leaf in found),
        row_by_row=sum(leaf.nbytes for leaf in found if leaf.row_by_row),
    )


def _has_keys(layer: nn.Module) -> bool:
    return any(name.rsplit(".", 1)[-1] == "k_proj" for name, _ in layer.named_modules())


def _widths(layer: nn.Module) -> list[tuple[str, int, int]]:
    """(name, inputs, outputs) of a layer's linear layers, without those of wrappers."""
    found = {}
    for path, module in layer.named_modules():
        if isinstance(bare(module), nn.Linear | nn.QuantizedLinear):
            found[path.removesuffix(".base").removesuffix(".base")] = linear_sizes(module)
    return [(path.rsplit(".", 1)[-1], *sizes) for path, sizes in found.items()]


def _per_row(widths: list[tuple[str, int, int]], hidden_size: int) -> int:
    """Floats that a layer keeps per row.

    Every linear keeps its output, and what becomes of it; norms and residuals two hidden vectors more (measured).
    """
    return 2 * sum(outputs for _, _, outputs in widths) + 2 * hidden_size


def parameter_bytes(module: nn.Module) -> int:
    """Bytes of all parameters."""
    return sum(value.nbytes for _, value in _named(module.parameters()))


def training_bytes(module: nn.Module, workers: int, averaged: bool) -> int:
    """Bytes of the trained parameters of `module`, with optimizer state and a gradient per worker, in float32.

    Args:
        averaged: whether their average is kept too.
    """
    trained = sum(value.size for _, value in _named(module.trainable_parameters()))
    return FLOAT * trained * (ADAPTER_COPIES + averaged + workers - 1)


def _named(tree: Any) -> list[tuple[str, mx.array]]:
    return cast("list[tuple[str, mx.array]]", tree_flatten(tree))


def beside(weights: int) -> int:
    """Bytes that the process has in memory now beside weights of this size; a GPU's own memory if it has some."""
    return max(0, (mx.get_active_memory() if _memory_of_gpu() else resident_memory()) - weights)
