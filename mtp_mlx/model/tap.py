"""Records the input or the output of a module's newest call; the module and its parameters are unchanged.

MTP heads of some families read the trunk's hidden states before its final norm, or before its last layer (Meta's).
The trunk of mlx-lm returns neither, but one of its norms is called with each of them. Others also read what lower
layers return (EAGLE-3).
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
        module.__class__ = type(f"Tapped{self._kind.__name__}", (self._mixin, self._kind), {})

    @property
    def _mixin(self) -> type:
        return _TappedInput

    def hear(self, x: mx.array) -> None:
        """Called by the module with what is recorded."""
        self._seen = x

    def take(self) -> mx.array:
        """What was recorded of the module's newest call; can be taken once per call."""
        assert self._seen is not None, "the module was not called in this pass"
        seen, self._seen = self._seen, None
        return seen

    def remove(self) -> None:
        """Restores the module."""
        self._module.__class__ = self._kind
        del self._module._tap


class OutputTap(Tap):
    """Records the output of a decoder layer until removed."""

    @property
    def _mixin(self) -> type:
        return _TappedOutput


class _Tapped:
    """Mixin for the class of a tapped module."""

    _tap: Tap


class _TappedInput(_Tapped):
    """Mixin for the class of a module whose input is recorded."""

    def __call__(self, x: mx.array, *args: Any, **kwargs: Any) -> Any:
        self._tap.hear(x)
        return super().__call__(x, *args, **kwargs)  # type: ignore[misc]


class _TappedOutput(_Tapped):
    """Mixin for the class of a decoder layer whose output is recorded."""

    def __call__(self, x: mx.array, *args: Any, **kwargs: Any) -> Any:
        found = super().__call__(x, *args, **kwargs)  # type: ignore[misc]
        if not isinstance(found, mx.array) or found.shape != x.shape:
            raise MTPError(
                "these MTP heads read what lower layers return, and the layers of this model do not return hidden "
                "states alone"
            )
        self._tap.hear(found)
        return found


def tapped_layers(trunk: Any, numbers: tuple[int, ...]) -> list[nn.Module]:
    """The decoder layers with these `numbers` (from 1), in this order.

    Raises:
        MTPError: if there are fewer layers.
    """
    if any(not 1 <= number <= len(trunk.layers) for number in numbers):
        raise MTPError(
            f"these MTP heads read what layers {', '.join(map(str, numbers))} return, and this model has "
            f"{len(trunk.layers)}"
        )
    return [trunk.layers[number - 1] for number in numbers]


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
