"""The keys and values of one head: the caches that its layers take, grown and trimmed alike."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import mlx.core as mx

from mtp_mlx.drafters.heads.layer_call import LayerCall, cache_parts


class HeadCache:
    """Caches of a head's layers; those of layers without attention stay empty.

    Args:
        calls: how its decoder layers are called.
    """

    def __init__(self, calls: Sequence[LayerCall]) -> None:
        self.layers = [call.make_cache() for call in calls]
        self._parts = [part for layer in self.layers for part in cache_parts(layer)]

    @property
    def offset(self) -> int:
        """Number of rows."""
        return max(int(part.offset) for part in self._parts)

    def trim(self, rows: int) -> None:
        """Removes the newest `rows` rows."""
        for part in self._parts:
            part.trim(rows)

    @contextmanager
    def repeated(self, count: int) -> Iterator[None]:
        """Temporarily holds the rows `count` times, so that a batch of continuations can run; keeps the first's."""
        for part in self._parts if count > 1 else ():
            if part.keys is not None:
                part.keys, part.values = (
                    mx.repeat(part.keys, count, axis=0),
                    mx.repeat(part.values, count, axis=0),
                )
        yield
        for part in self._parts if count > 1 else ():
            if part.keys is not None:
                part.keys, part.values = part.keys[:1], part.values[:1]

    def make_mask(self, *args: Any, **kwargs: Any) -> Any:
        """See mlx-lm's caches: the mask of new rows, which all layers share."""
        return max(self._parts, key=lambda part: part.offset).make_mask(*args, **kwargs)

    @property
    def state(self) -> list[Any]:
        """Arrays of the layers that have any, for evaluation."""
        return [part.state for part in self._parts if part.offset]
