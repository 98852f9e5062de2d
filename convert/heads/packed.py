"""Heads that are stored quantised: matrices stay packed, and are run so.

mlx packs a matrix [..., M, N] of b bits in groups of g into `weight` [..., M, N b / 32] of uint32, `scales` and, in
its affine mode, `biases` [..., M, N / g]. What a matrix is quantised to is therefore read off the shapes of its own
tensors: every matrix may have another number of bits, and config.json, which may be wrong about heads, is not asked.

A few steps need the numbers themselves, such as taking latent attention's `kv_b_proj` apart: what they make is not
quantised, and small.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from mtp_mlx.convert.heads.targets import Shape, Step, Target
from mtp_mlx.convert.heads.unpack import numbers_of
from mtp_mlx.convert.read.lazy_tensor import FLOATS, LazyTensor, from_float32
from mtp_mlx.errors import ConversionError

_AFFINE_BITS, _AFFINE_GROUPS = (2, 3, 4, 5, 6, 8), (16, 32, 64, 128)
# Modes without biases: (bits, numbers in a group) -> mlx's name. Their scales are bytes.
_FLOATING = {(4, 32): "mxfp4", (8, 32): "mxfp8", (4, 16): "nvfp4"}
PACKED = ("U32",)  # the type of their weights
_SHOWN = 4  # names in a note
_WEIGHT, _SCALES, _BIASES = ".weight", ".scales", ".biases"


@dataclass(frozen=True)
class Packing:
    """How a matrix is quantised, as `mlx.nn.quantize` takes it."""

    group_size: int
    bits: int
    mode: str = "affine"

    def to_json(self) -> dict[str, Any]:
        """For mtp_config.json."""
        return {"group_size": self.group_size, "bits": self.bits, "mode": self.mode}


def is_packed(name: str, tensors: Mapping[str, LazyTensor]) -> bool:
    """Whether the stored tensor `name` is the weight of a quantised matrix."""
    return name.endswith(_WEIGHT) and name.removesuffix(_WEIGHT) + _SCALES in tensors


def parts_of(name: str, tensors: Mapping[str, LazyTensor]) -> set[str]:
    """The stored tensors of the matrix whose weight is `name`."""
    stem = name.removesuffix(_WEIGHT)
    return {name, *({stem + _SCALES, stem + _BIASES} & tensors.keys() if name.endswith(_WEIGHT) else ())}


def unpacked(
    targets: list[Target], tensors: Mapping[str, LazyTensor]
) -> tuple[list[Target], dict[str, Packing]]:
    """`targets` as far as they are stored quantised in parts, and how.

    A target of quantised matrices becomes three (two without biases), `.weight`, `.scales` and `.biases`, to which
    the target's step is applied as they are. If the step needs the numbers, it remains one, which is not quantised.
    Others stay.

    Returns:
        The targets, and {canonical name without ".weight": how it is quantised}.

    Raises ConversionError: quantised in a way that mlx does not know.
    """
    out: list[Target] = []
    packings: dict[str, Packing] = {}
    for target in targets:
        if not any(is_packed(name, tensors) for name, _ in target.sources):
            out.append(target)
            continue
        packing = _packing(target, tensors)
        if not _stays_packed(target, packing):
            out.append(_dequantised(target, packing, tensors))
            continue
        stem = target.name.removesuffix(_WEIGHT)
        packings[stem] = packing
        out += [_part(target, stem, part, packing) for part in _parts(packing)]
    return out, packings


def described(packings: Mapping[str, Packing]) -> dict[str, Any]:
    """`HeadsConfig.quantization` of these matrices; empty if there are none."""
    if not packings:
        return {}
    usual = Counter(packings.values()).most_common(1)[0][0]
    layers = {name: packing.to_json() for name, packing in packings.items() if packing != usual}
    return usual.to_json() | ({"layers": layers} if layers else {})


def _parts(packing: Packing) -> tuple[str, ...]:
    return (_WEIGHT, _SCALES, _BIASES) if packing.mode == "affine" else (_WEIGHT, _SCALES)


def _part(target: Target, stem: str, part: str, packing: Packing) -> Target:
    """The target of a part of quantised matrices."""

    def shape(whole: Shape) -> Shape:
        columns = whole[-1] * packing.bits // 32 if part == _WEIGHT else whole[-1] // packing.group_size
        return (*whole[:-1], columns)

    dtypes = PACKED if part == _WEIGHT else FLOATS if packing.mode == "affine" else ("U8",)
    sources = tuple((name.removesuffix(_WEIGHT) + part, shape(whole)) for name, whole in target.sources)
    return replace(target, name=stem + part, shape=shape(target.shape), sources=sources, dtypes=dtypes)


def _packing(target: Target, tensors: Mapping[str, LazyTensor]) -> Packing:
    """How the matrices that make a target are quantised: all of them alike."""
    found = {packing_of(name, shape, tensors) for name, shape in target.sources}
    if len(found) > 1:
        name = target.sources[0][0]
        raise ConversionError(f"{name} and its siblings are not quantised alike; use the unquantised heads")
    return found.pop()


def _stays_packed(target: Target, packing: Packing) -> bool:
    """Whether the target's step may be applied to the parts of its matrices as they are."""
    width = target.sources[0][1][-1]
    return target.step.packed and not (target.step.halves_columns and width // 2 % packing.group_size)


def _dequantised(target: Target, packing: Packing, tensors: Mapping[str, LazyTensor]) -> Target:
    """The target of one quantised matrix whose step needs its numbers; made in the type of the scales."""
    ((name, whole),) = target.sources
    scales, step = tensors[name.removesuffix(_WEIGHT) + _SCALES], target.step
    kind = scales.dtype if packing.mode == "affine" else "BF16"
    parts = [_part(target, "", part, packing) for part in _parts(packing)]
    sources = tuple(source for part in parts for source in part.sources)
    types = [tensors[source].dtype for source, _ in sources]

    def made(arrays: Sequence[np.ndarray]) -> np.ndarray:
        numbers = numbers_of(arrays, types, **packing.to_json())
        assert step.bits is not None
        return from_float32(step.bits([numbers.reshape(whole)]), kind)

    return replace(
        target,
        sources=sources,
        step=Step(f"{step.text}, dequantised", bits=made),
        dtypes=tuple(sorted({one for part in parts for one in part.dtypes})),
        made_as=kind,
    )


def dequantised_note(targets: list[Target]) -> list[str]:
    """What is said of targets that are stored quantised, and not kept so; empty if there are none."""
    names = [target.name for target in targets if target.made_as]
    if not names:
        return []
    shown = ", ".join(names[:_SHOWN]) + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")
    return [f"what has to be taken apart is dequantised: {shown}; other matrices stay quantised"]


def packing_of(name: str, shape: Shape, tensors: Mapping[str, LazyTensor]) -> Packing:
    """How a matrix of `shape` is quantised, by the shapes of its parts."""
    stem = name.removesuffix(_WEIGHT)
    weight, scales = tensors.get(name), tensors.get(stem + _SCALES)
    if weight is None or scales is None:
        raise ConversionError(f"{stem} is quantised only in part; get the whole checkpoint")
    columns, groups = weight.shape[-1] if weight.shape else 0, scales.shape[-1] if scales.shape else 0
    bits, group_size = columns * 32 // shape[-1], shape[-1] // max(groups, 1)
    mode = "affine" if stem + _BIASES in tensors else _FLOATING.get((bits, group_size), "")
    whole = columns * 32 == shape[-1] * bits and groups * group_size == shape[-1]
    known = bits in _AFFINE_BITS and group_size in _AFFINE_GROUPS if mode == "affine" else bool(mode)
    if not whole or not known or weight.dtype != "U32":
        raise ConversionError(
            f"{name} is {weight.dtype} {list(weight.shape)} with scales {list(scales.shape)}, which is no "
            f"quantisation of {list(shape)} that mlx knows; is config.json that of this model?"
        )
    return Packing(group_size, bits, mode)
