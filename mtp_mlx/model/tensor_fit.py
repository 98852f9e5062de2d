"""Whether the tensors of a file are those that a module needs, said in one sentence."""

from __future__ import annotations

from collections.abc import Mapping

import mlx.core as mx

from mtp_mlx.errors import MTPError

SHOWN = 8  # misfits named before the rest is only counted


def check_fit(own: Mapping[str, mx.array], tensors: Mapping[str, mx.array]) -> None:
    """Compares names and shapes.

    Args:
        own: what the module has.
        tensors: what the file has.

    Raises:
        MTPError: names missing, unexpected or of another shape; all of them in one message.
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
