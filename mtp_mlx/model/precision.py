"""The precision of a model's weights, in words. Acceptance of drafts depends on it, as the model's own picks do."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable

import mlx.core as mx
import mlx.nn as nn


def precision_of(linears: Iterable[nn.Module]) -> str:
    """The precision of linear layers: "float32", "bfloat16", "4-bit", or "mixed: 4-bit, 6-bit (4.4 bits a weight)".

    Affine quantisation is named by its bits, another by its mode: "mxfp4". The bits a weight are the mean over the
    weights, without their scales.
    """
    weights: Counter[str] = Counter()
    for layer in map(bare, linears):
        name = _precision(layer)
        weights[name] += layer["weight"].nbytes * 8 / _bits(name)
    if len(weights) == 1:
        return next(iter(weights))
    if not weights:
        return "mixed: no linear layers"
    mean = sum(_bits(name) * count for name, count in weights.items()) / weights.total()
    return f"mixed: {', '.join(sorted(weights))} ({mean:.1f} bits a weight)"


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
    """A linear layer without the wrappers of an attached model and without an update of mlx-lm's LoRA."""
    while inner := [name for name in ("base", "linear") if name in layer]:
        layer = layer[inner[0]]
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
    """Bits of a weight; of a mixed precision the mean that it names, or in older folders the mean over its parts."""
    mean = re.search(r"\(([\d.]+) bits a weight\)", precision)
    if mean is not None:
        return float(mean[1])
    numbers = [int(digits) for digits in re.findall(r"\d+", precision)]
    return max(sum(numbers) / len(numbers), 1.0) if numbers else 16.0
