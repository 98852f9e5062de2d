"""The tensors that heads are converted to: their canonical names, and how each is made of stored tensors.

Names, for head i (D = hidden size, V = vocabulary):

    heads.{i}.fuse.weight [D, 2D]        columns 0..D-1 act on the embedding, D..2D-1 on the hidden state
    heads.{i}.norm_embedding.weight, heads.{i}.norm_hidden.weight [D]
    heads.{i}.block.<name in mlx-lm's decoder layer>    .block.{j}.<name> where a head has several layers
    heads.{i}.norm_out.weight [D]        absent: the identity, or the trunk's (see `HeadConvention.output_norm`)
    heads.{i}.embed_tokens.weight, heads.{i}.lm_head.weight [V, D]    absent: shared with the trunk

Medusa's heads have `heads.{i}.residual.{j}.weight|bias` and `heads.{i}.lm_head.weight` instead. Norms are plain
gains: if a family stores them around zero, 1 is added. Quantised matrices have `.scales` and `.biases` beside their
weight, as in mlx (see `packed`).
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from mtp_mlx.convert.read.lazy_tensor import FLOATS, STORED_AS, LazyTensor, from_float32, to_float32
from mtp_mlx.drafters.heads.convention import HeadConvention

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Step:
    """How stored tensors are turned into a canonical one.

    Attributes:
        text: the step in words; empty if nothing changes.
        bits: works on the arrays as stored, exact in any type.
        values: works on the values of a single array in float32; takes the place of `bits`.
        packed: `bits` is right for the parts of quantised matrices too, see `packed`.
        halves_columns: that holds only if half a row is a whole number of groups.
    """

    text: str
    bits: Callable[[Sequence[np.ndarray]], np.ndarray] | None = None
    values: Callable[[np.ndarray], np.ndarray] | None = None
    packed: bool = False
    halves_columns: bool = False


AS_IT_IS = Step("", bits=lambda arrays: arrays[0], packed=True)
SWAP = Step(
    "columns swapped to [embedding ; hidden]",
    bits=lambda arrays: np.concatenate(np.split(arrays[0], 2, axis=1)[::-1], axis=1),
    packed=True,
    halves_columns=True,
)
ADD_ONE = Step("1 added", values=lambda norm: norm + np.float32(1))
STACK = Step("stacked", bits=np.stack, packed=True)
TRANSPOSED = Step("transposed", bits=lambda arrays: arrays[0].T)


def half(which: int) -> Step:
    """The first (0) or second (1) half of the rows of each [..., 2N, D] matrix."""
    name = ("first", "second")[which]
    return Step(
        f"{name} half of the rows", bits=lambda arrays: np.split(arrays[0], 2, axis=-2)[which], packed=True
    )


def scaled(factor: float) -> Step:
    """Multiplied by a number."""
    return Step(f"times {factor:.6g}", values=lambda values: values * np.float32(factor))


@dataclass(frozen=True)
class Target:
    """A canonical tensor: its name and shape, the stored tensors it is made of with their shapes, and how.

    dtypes: the types that the stored tensors may have.
    made_as: the type that it is made in, of stored tensors of several types; empty: their own.
    """

    name: str
    shape: Shape
    sources: tuple[tuple[str, Shape], ...]
    step: Step = AS_IT_IS
    dtypes: tuple[str, ...] = FLOATS
    made_as: str = ""

    def dtype(self, tensors: Mapping[str, LazyTensor]) -> str:
        """Its type, that of its sources unless it is made in another."""
        return self.made_as or tensors[self.sources[0][0]].dtype

    def build(self, tensors: Mapping[str, LazyTensor]) -> np.ndarray:
        """The array, of `shape`, in its stored type (as bits if numpy does not have that type)."""
        arrays = [tensors[name].load() for name, _ in self.sources]
        if self.step.values is not None:
            dtype = self.dtype(tensors)
            return from_float32(self.step.values(to_float32(arrays[0], dtype)), dtype)
        assert self.step.bits is not None
        return np.ascontiguousarray(self.step.bits(arrays)).reshape(self.shape)


@dataclass(frozen=True)
class Block:
    """The decoder layer(s) of a head as classes of mlx-lm.

    Built as `class_name(args_class.from_dict({**model config, **overrides}), **layers[j])`.

    Attributes:
        module: a module of mlx_lm.models.
        layers: arguments of each layer after the model's; one layer except for Nemotron-H.
        targets: their tensors; target names are relative to the block, source names are not.
        window: most rows that its attention sees, its own included; None for all.
    """

    module: str
    class_name: str
    args_class: str
    layers: tuple[dict[str, Any], ...]
    overrides: dict[str, Any]
    targets: tuple[Target, ...]
    window: int | None = None

    def to_json(self) -> dict[str, Any]:
        """For mtp_config.json."""
        return {
            "module": f"mlx_lm.models.{self.module}",
            "class": self.class_name,
            "args_class": self.args_class,
            "overrides": self.overrides,
            "layers": list(self.layers),
            "window": self.window,
        }


@dataclass
class HeadPlan:
    """How a checkpoint's heads are converted. Made by `plan.plan_heads`, carried out by `write.fill_folder`.

    Attributes:
        title: of their family.
        count: number of heads.
        blocks: one for each head; empty for Medusa.
        dropped: (stored tensor, the trunk's tensor it equals byte for byte).
        notes: what else was decided, and why.
        model_config: the language model's configuration, as far as a block needs it.
        drafts: tokens the heads were trained to draft in a step; 0 for one each.
        quantization: of matrices that are stored quantised, see `HeadsConfig`.
    """

    title: str
    convention: HeadConvention
    count: int
    targets: list[Target]
    blocks: list[Block] = field(default_factory=list)
    dropped: list[tuple[str, str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    model_config: dict[str, Any] = field(default_factory=dict)
    drafts: int = 0
    quantization: dict[str, Any] = field(default_factory=dict)


def save_targets(
    path: Path,
    targets: list[Target],
    tensors: Mapping[str, LazyTensor],
    progress: Callable[[str], None] | None = None,
    dtype: str | None = None,
) -> None:
    """Write `targets` to the safetensors file `path`, one tensor at a time.

    Args:
        tensors: the stored tensors by name.
        progress: called with the name of each tensor before it is written.
        dtype: "F32", "BF16" or "F16" to cast floats to; None to keep their stored types.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "mlx"}}
    position = 0
    for target in targets:
        kind = _kind(target, tensors, dtype)
        end = position + math.prod(target.shape) * np.dtype(STORED_AS[kind]).itemsize
        header[target.name] = {"dtype": kind, "shape": list(target.shape), "data_offsets": [position, end]}
        position = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # the numbers begin at a multiple of 8
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for target in targets:
            if progress is not None:
                progress(target.name)
            built, stored = target.build(tensors), target.dtype(tensors)
            kind = _kind(target, tensors, dtype)
            if kind != stored:
                built = from_float32(to_float32(built, stored), kind)
            file.write(built.tobytes())


def _kind(target: Target, tensors: Mapping[str, LazyTensor], dtype: str | None) -> str:
    """The type a target is written in."""
    stored = target.dtype(tensors)
    return dtype if dtype is not None and stored in FLOATS else stored
