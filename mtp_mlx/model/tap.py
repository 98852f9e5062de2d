"""Records the input of a module's newest call; the module and its parameters are unchanged.

MTP heads of some families read the trunk's hidden states before its final norm, or before its last layer (Meta's).
The trunk of mlx-lm returns neither, but one of its norms is called with each of them.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mtp_mlx.errors import MTPError

LAST_NORMS = ("norm", "norm_f")
LAYER_NORMS = ("input_layernorm", "norm")


class Tap:
    """Records the input of `module` until removed.

    Raises:
        MTPError: if the module is already tapped, because the model is attached.
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
        """The input of the module's newest call; can be taken once per call."""
        assert self._seen is not None, "the module was not called in this pass"
        seen, self._seen = self._seen, None
        return seen

    def remove(self) -> None:
        """Restores the module."""
        self._module.__class__ = self._kind
        del self._module._tap


class _Tapped:
    """Mixin for the class of a tapped module."""

    _tap: Tap

    def __call__(self, x: mx.array, *args: Any, **kwargs: Any) -> Any:
        self._tap.hear(x)
        return super().__call__(x, *args, **kwargs)  # type: ignore[misc]


def tapped_module(trunk: Any, first_hidden: str) -> nn.Module | None:
    """The norm whose input is the hidden state `first_hidden` (`Speculator.first_hidden`); None for "post-norm".

    Raises:
        MTPError: if the trunk has no such norm.
    """
    if first_hidden == "post-norm":
        return None
    owner, names = (trunk, LAST_NORMS) if first_hidden == "pre-norm" else (trunk.layers[-1], LAYER_NORMS)
    for name in names:
        if isinstance(owner.get(name), nn.Module):
            return owner[name]
    where = (
        "the trunk's final norm"
        if first_hidden == "pre-norm"
        else "the norm at the start of the trunk's last layer"
    )
    raise MTPError(
        f"these MTP heads read hidden states '{first_hidden}', but {where} is not found in this model"
    )
