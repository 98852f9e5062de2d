"""Listening to a module: what went into its newest call. The module and its parameters stay what they are.

MTP heads of some families take the trunk's state before its last norm, or before its last layer (Meta's). Neither is
what mlx-lm's trunk returns, but both are what one of its norms is called with.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mtp_mlx.errors import MTPError

LAST_NORMS = ("norm", "norm_f")
LAYER_NORMS = ("input_layernorm", "norm")


class Tap:
    """Listens to `module` until removed.

    Raises:
        MTPError: somebody listens already (the model is attached).
    """

    def __init__(self, module: nn.Module) -> None:
        if isinstance(module, _Tapped):
            raise MTPError("this model is already attached; detach it first")
        self._module, self._kind = module, type(module)
        self._seen: mx.array | None = None
        module._tap = self
        module.__class__ = type(f"Tapped{self._kind.__name__}", (_Tapped, self._kind), {})

    def hear(self, x: mx.array) -> None:
        """Called by the module with its input."""
        self._seen = x

    def take(self) -> mx.array:
        """What the module was called with last; once."""
        assert self._seen is not None, "the module was not called in this pass"
        seen, self._seen = self._seen, None
        return seen

    def remove(self) -> None:
        """The module is as it was."""
        self._module.__class__ = self._kind
        del self._module._tap


class _Tapped:
    """Mixed into the class of a module that is listened to."""

    _tap: Tap

    def __call__(self, x: mx.array, *args: Any, **kwargs: Any) -> Any:
        self._tap.hear(x)
        return super().__call__(x, *args, **kwargs)  # type: ignore[misc]


def tapped_module(trunk: Any, first_hidden: str) -> nn.Module | None:
    """The norm that is called with the state `first_hidden` (see `HeadConvention`); None for "post-norm".

    Raises:
        MTPError: the trunk has no such norm.
    """
    if first_hidden == "post-norm":
        return None
    owner, names = (trunk, LAST_NORMS) if first_hidden == "pre-norm" else (trunk.layers[-1], LAYER_NORMS)
    for name in names:
        if isinstance(owner.get(name), nn.Module):
            return owner[name]
    where = (
        "the trunk's last norm"
        if first_hidden == "pre-norm"
        else "the norm that the trunk's last layer begins with"
    )
    raise MTPError(f"these MTP heads take the state '{first_hidden}', but {where} is not found in this model")
