"""The exponential moving average (EMA) of the trained weights, which is measured and exported in place of the last.

    average <- d * average + (1 - d) * weights,   d = min(decay, (1 + t) / (10 + t)) in step t, from 0

The smaller d of early steps keeps the initial weights from staying in the average of a short run.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_map, tree_map_with_path

from mtp_mlx.errors import MTPError


class WeightAverage:
    """The average of a module's trainable parameters, in float32; with decay 0 there is none, and nothing changes.

    Args:
        module: the trained module; the average starts at its weights.
        decay: share of the average that a late step keeps, in [0, 1).
    """

    def __init__(self, module: nn.Module, decay: float) -> None:
        self._module, self._decay = module, decay
        self._weights: dict[str, Any] = {}  # nested as the module's parameters
        self.restart()

    def restart(self) -> None:
        """Starts again at the module's weights."""
        if self._decay:
            trained = self._module.trainable_parameters()
            self._weights = tree_map(lambda value: value.astype(mx.float32), trained)

    def update(self, step: int) -> None:
        """Takes the weights after step `step` in, counted from 0."""
        if not self._decay:
            return
        keep = min(self._decay, (1 + step) / (10 + step))
        self._weights = tree_map(
            lambda average, value: keep * average + (1 - keep) * value.astype(mx.float32),
            self._weights,
            self._module.trainable_parameters(),
        )
        mx.eval(self._weights)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Within it, the module has the averaged weights."""
        if not self._decay:
            yield
            return
        last = self._module.trainable_parameters()
        self._module.update(tree_map(lambda average, value: average.astype(value.dtype), self._weights, last))
        try:
            yield
        finally:
            self._module.update(last)

    def tensors(self) -> dict[str, mx.array]:
        """The average by dotted name, float32."""
        return dict(cast("list[tuple[str, mx.array]]", tree_flatten(self._weights)))

    def load_tensors(self, tensors: Mapping[str, mx.array]) -> None:
        """Restores what `tensors` returned.

        Raises:
            MTPError: a tensor is missing or has another shape.
        """

        def restored(name: str, value: mx.array) -> mx.array:
            if name not in tensors or tensors[name].shape != value.shape:
                raise MTPError(f"the averaged weights lack {name}, or it has another shape")
            return tensors[name]

        self._weights = tree_map_with_path(restored, self._weights)
