"""Several states of the trunk as the input of a head: those of lower layers beside the last one (EAGLE-3).

EAGLE-3 (arXiv 2503.01840, section 3.1) joins a low, a middle and a high state by one linear layer. Here each is
normalised first, since the residual stream grows from layer to layer, and the last one is the state that heads read
anyway. The linear layer starts by passing on the last state alone, so new heads start as they would without taps.

Legend: n tapped layers, D hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx
import mlx.nn as nn

from mtp_mlx.errors import MTPError

LAST = "last"


def layer_numbers(taps: str, layers: int) -> tuple[int, ...]:
    """Numbers (from 1) of the decoder layers that `taps` names, ascending; the last state is not among them.

    Args:
        taps: names separated by commas: "low", "middle" and "high", which are EAGLE-3's places, a layer's number, and
            "last", which is always read and must be named.
        layers: decoder layers of the model.

    Raises:
        MTPError: a name is unknown, "last" is missing, or the model has no such layer.
    """
    names = [name.strip() for name in taps.split(",")]
    places = {"low": min(2, layers), "middle": max(1, layers // 2), "high": max(1, layers - 3)}
    if LAST not in names:
        raise MTPError(f"`taps` {taps!r} leaves out 'last', the state that every head reads: add it")
    found = set()
    for name in names:
        if name == LAST:
            continue
        if name not in places and not name.isdecimal():
            raise MTPError(
                f"`taps` has {name!r}: give low, middle, high, last or numbers of layers, separated by commas"
            )
        number = places[name] if name in places else int(name)
        if not 1 <= number <= layers:
            raise MTPError(f"`taps` names layer {number}, and the model has layers 1 to {layers}")
        found.add(number)
    return tuple(sorted(found))


class TapFusion(nn.Module):
    """Joins the states of tapped layers and the last state into one.

    Args:
        layers: numbers (from 1) of the tapped layers.
        hidden_size: D.
        eps: epsilon of the norms.
    """

    def __init__(self, layers: Sequence[int], hidden_size: int, eps: float) -> None:
        super().__init__()
        self._layers = tuple(layers)
        count = len(self._layers) + 1
        self.norms = [nn.RMSNorm(hidden_size, eps) for _ in range(count)]
        self.fuse = nn.Linear(
            count * hidden_size, hidden_size, bias=False
        )  # [D, (n + 1) D], the last state last
        self.fuse.weight = mx.concatenate(
            [mx.zeros((hidden_size, (count - 1) * hidden_size)), mx.eye(hidden_size)], axis=1
        )

    @property
    def layers(self) -> tuple[int, ...]:
        """Numbers (from 1) of the tapped layers."""
        return self._layers

    def keep(self, before: TapFusion) -> None:
        """Takes over a fusion of fewer layers: what it computes stays the same until training changes it.

        Raises:
            ValueError: `before` reads a layer that this one does not.
        """
        size = self.fuse.weight.shape[0]
        places = [self._layers.index(layer) for layer in before.layers] + [len(self._layers)]
        columns = [mx.zeros((size, size)) for _ in self.norms]
        for place, norm, column in zip(
            places, before.norms, mx.split(before.fuse.weight, len(before.norms), axis=1), strict=True
        ):
            columns[place] = column.astype(mx.float32)
            self.norms[place].weight = norm.weight.astype(mx.float32)
        self.fuse.weight = mx.concatenate(columns, axis=1)  # [D, (n + 1) D]

    def __call__(self, states: mx.array) -> mx.array:
        """[..., (n + 1) * D] as `AttachedModel.head_input` -> [..., D]."""
        parts = mx.split(states, len(self.norms), axis=-1)
        normed = [norm(part) for norm, part in zip(self.norms, parts, strict=True)]
        return self.fuse(mx.concatenate(normed, axis=-1))
