"""MTP heads as data: what a family's convention is, which stored tensors make up each canonical one, and how.

Canonical names, for head i (D = hidden size, V = vocabulary):

    heads.{i}.fuse.weight [D, 2D]        columns 0..D-1 act on the embedding, D..2D-1 on the hidden state
    heads.{i}.norm_embedding.weight, heads.{i}.norm_hidden.weight [D]
    heads.{i}.block.<name in mlx-lm's decoder layer>    .block.{j}.<name> where a head has several layers
    heads.{i}.norm_out.weight [D]        absent: the identity, or the trunk's own (`output_norm` says which)
    heads.{i}.embed_tokens.weight, heads.{i}.lm_head.weight [V, D]    absent: shared with the trunk

Medusa's heads have `heads.{i}.residual.{j}.weight|bias` and `heads.{i}.lm_head.weight` instead. Norms are plain
gains: where a family stores them around zero, 1 has been added.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from mtp_mlx.model.head_convention import HeadConvention

from .lazy_tensor import LazyTensor, from_float32, to_float32

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Step:
    """What turns stored tensors into a canonical one; `text` says it in words.

    bits: on the arrays as stored, exact in any type. values: on the values of the only one, in float32.
    """

    text: str
    bits: Callable[[Sequence[np.ndarray]], np.ndarray] | None = None
    values: Callable[[np.ndarray], np.ndarray] | None = None


AS_IT_IS = Step("", bits=lambda arrays: arrays[0])
SWAP = Step(
    "columns swapped to [embedding ; hidden]",
    bits=lambda arrays: np.concatenate(np.split(arrays[0], 2, axis=1)[::-1], axis=1),
)
ADD_ONE = Step("1 added", values=lambda norm: norm + np.float32(1))
STACK = Step("stacked", bits=np.stack)
TRANSPOSED = Step("transposed", bits=lambda arrays: arrays[0].T)


def half(which: int) -> Step:
    """The first (0) or second (1) half of the rows of each [..., 2N, D] matrix."""
    name = ("first", "second")[which]
    return Step(f"{name} half of the rows", bits=lambda arrays: np.split(arrays[0], 2, axis=-2)[which])


def scaled(factor: float) -> Step:
    """Multiplied by a number."""
    return Step(f"times {factor:.6g}", values=lambda values: values * np.float32(factor))


@dataclass(frozen=True)
class Target:
    """A canonical tensor: its name and shape, the stored tensors it is made of with their shapes, and how."""

    name: str
    shape: Shape
    sources: tuple[tuple[str, Shape], ...]
    step: Step = AS_IT_IS

    def dtype(self, tensors: Mapping[str, LazyTensor]) -> str:
        """Its type, that of its sources."""
        return tensors[self.sources[0][0]].dtype

    def build(self, tensors: Mapping[str, LazyTensor]) -> np.ndarray:
        """The array as stored (bits where numpy has no such type), of `shape`."""
        arrays = [tensors[name].load() for name, _ in self.sources]
        if self.step.values is not None:
            dtype = self.dtype(tensors)
            return from_float32(self.step.values(to_float32(arrays[0], dtype)), dtype)
        assert self.step.bits is not None
        return np.ascontiguousarray(self.step.bits(arrays)).reshape(self.shape)


@dataclass(frozen=True)
class Block:
    """A head's decoder layer(s): which classes of mlx-lm, made how, from which tensors.

    It is built as `class_name(args_class.from_dict({**model config, **overrides}), **layers[j])`.

    Attributes:
        module: a module of mlx_lm.models.
        layers: for each layer the arguments after the model's; one layer except for Nemotron-H.
        targets: their tensors; target names are below the block, source names whole.
        window: rows that its attention sees at most, its own included; None for all.
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
    """What a checkpoint's heads become. Made by `heads_plan.plan_heads`, carried out by `heads_write`.

    Attributes:
        title: the family in words.
        blocks: one for each head; empty for Medusa.
        dropped: (stored tensor, the trunk's tensor it equals byte for byte).
        notes: what else was decided, and why.
        model_config: the language model's configuration, as far as a block needs it.
        drafts: tokens the heads were trained to draft in a step; 0 for one each.
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
