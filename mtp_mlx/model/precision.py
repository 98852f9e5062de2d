"""The precision of a model's weights, in words. Acceptance of drafts depends on it, as the model's own picks do."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable

import mlx.core as mx
import mlx.nn as nn


def precision_of(linears: Iterable[nn.Module]) -> str:
    """The precision of linear layers: "float32", "bfloat16", "4-bit", or "mixed: 4-bit, 6-bit".

    Affine quantisation is named by its bits, another by its mode: "mxfp4".
    """
    found = sorted({_precision(bare(layer)) for layer in linears})
    return found[0] if len(found) == 1 else f"mixed: {', '.join(found) or 'no linear layers'}"


def _precision(layer: nn.Module) -> str:
    if "scales" not in layer:
        return dtype_name(layer["weight"].dtype)
    mode = getattr(layer, "mode", "affine")
    return f"{layer.bits}-bit" if mode == "affine" else str(mode)


def weight_format(layer: nn.Module) -> str:
    """Everything that decides how a linear layer's weights are rounded, in words."""
    if "scales" not in layer:
        return dtype_name(layer["weight"].dtype)
    scales = dtype_name(layer["scales"].dtype)
    return (
        f"{getattr(layer, 'mode', 'affine')} {layer.bits}-bit, groups of {layer.group_size}, {scales} scales"
    )


def bare(layer: nn.Module) -> nn.Module:
    """A linear layer without the wrappers of an attached model."""
    while "base" in layer:
        layer = layer["base"]
    return layer


def dtype_name(dtype: mx.Dtype) -> str:
    """ "float32" for `mx.float32`."""
    return str(dtype).removeprefix("mlx.core.")


def nearest_precision(known: Iterable[str], wanted: str) -> str | None:
    """The one of `known` that is `wanted`, or else closest to it in bits a weight; None if nothing is known."""
    return min(known, key=lambda name: (name != wanted, _distance(name, wanted)), default=None)


def _distance(one: str, other: str) -> float:
    return abs(math.log2(_bits(one)) - math.log2(_bits(other)))


def _bits(precision: str) -> float:
    """Bits of a weight, the mean over the parts of a mixed precision."""
    numbers = [int(digits) for digits in re.findall(r"\d+", precision)]
    return max(sum(numbers) / len(numbers), 1.0) if numbers else 16.0
