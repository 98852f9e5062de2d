"""The keys and values of one head: an mlx-lm cache for each of its layers, grown and trimmed alike."""

from __future__ import annotations

from typing import Any

from mlx_lm.models.cache import KVCache


class HeadCache:
    """Caches of a head's layers; those of layers without attention stay empty.

    Args:
        layers: number of decoder layers.
    """

    def __init__(self, layers: int) -> None:
        self.layers = [KVCache() for _ in range(layers)]

    @property
    def offset(self) -> int:
        """Number of rows."""
        return max(int(layer.offset) for layer in self.layers)

    def trim(self, rows: int) -> None:
        """Removes the newest `rows` rows."""
        for layer in self.layers:
            layer.trim(rows)

    def make_mask(self, *args: Any, **kwargs: Any) -> Any:
        """See mlx-lm's caches: the mask of new rows, which all layers share."""
        return max(self.layers, key=lambda layer: layer.offset).make_mask(*args, **kwargs)

    @property
    def state(self) -> list[Any]:
        """Arrays of the layers that have any, for evaluation."""
        return [layer.state for layer in self.layers if layer.offset]
