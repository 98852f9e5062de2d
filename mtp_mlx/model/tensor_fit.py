"""Fits a module to the tensors of a file: which of its layers are quantised, and that no tensor is missing or odd."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mtp_mlx.errors import MTPError

SHOWN = 8  # problems listed before the rest is only counted


def check_fit(own: Mapping[str, mx.array], tensors: Mapping[str, mx.array]) -> None:
    """Checks names and shapes.

    Args:
        own: the module's tensors.
        tensors: the file's tensors.

    Raises:
        MTPError: if tensors are missing, unexpected or of another shape (lists them).
    """
    problems = [f"missing {name} {own[name].shape}" for name in sorted(own.keys() - tensors.keys())]
    problems += [f"unexpected {name} {tensors[name].shape}" for name in sorted(tensors.keys() - own.keys())]
    for name in sorted(own.keys() & tensors.keys()):
        if own[name].shape != tensors[name].shape:
            problems.append(f"{name} is {tensors[name].shape} in the file, {own[name].shape} expected")
    if problems:
        more = f"; and {len(problems) - SHOWN} more" if len(problems) > SHOWN else ""
        raise MTPError(
            f"the adapter's tensors do not fit the base model: {'; '.join(problems[:SHOWN])}{more}"
        )


def quantise_like(module: nn.Module, names: Collection[str], quantisation: Mapping[str, Any]) -> None:
    """Makes the layers quantised whose scales are among the tensors `names`; their weights are loaded later.

    Args:
        quantisation: "group_size", "bits" and perhaps "mode", and "layers" with those that differ, by name.

    Raises:
        KeyError, ValueError: the quantisation is damaged, or of a kind that mlx does not know.
    """
    usual = {key: value for key, value in quantisation.items() if key != "layers"}
    layers = quantisation.get("layers", {})

    def how(path: str, layer: nn.Module) -> bool | dict[str, Any]:
        stored = f"{path}.scales" in names and hasattr(layer, "to_quantized")
        return dict(layers.get(path, usual)) if stored else False

    nn.quantize(module, class_predicate=how)
