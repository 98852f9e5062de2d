"""Checks that a file has exactly the tensors that a module needs."""

from __future__ import annotations

from collections.abc import Mapping

import mlx.core as mx

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
