"""Proves that the rows of every readable cache come back in the order of the text, with their positions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.models.cache import KVCache, QuantizedKVCache, RotatingKVCache

from mtp_mlx.model.cached_rows import cached_rows, is_readable
from mtp_mlx.model.keeping_cache import KeepingCache
from mtp_mlx.model.window_cache import WindowCache


def rows(count: int) -> mx.array:
    """[1, 2, count, 32], the same for every width of a head: where a row stands."""
    return mx.broadcast_to(mx.arange(count, dtype=mx.float32)[:, None], (1, 2, count, 32))


MADE: dict[str, Callable[[], Any]] = {
    "plain": KVCache,
    "quantised": lambda: QuantizedKVCache(group_size=32, bits=8),
    "window": lambda: WindowCache(RotatingKVCache(max_size=7)),
}


@pytest.mark.parametrize("kind", MADE)
@pytest.mark.parametrize("most", [None, 9])
def test_rows_and_their_positions(kind: str, most: int | None) -> None:
    """Some are written alone, and some are taken back."""
    cache = MADE[kind]()
    for first, last in ((0, 290), (290, 291), (291, 304)):
        part = rows(last)[..., first:, :]
        cache.update_and_fetch(part, -part)
    cache.trim(4)
    found = cached_rows(cache, most)
    places = found.start + np.arange(found.keys.shape[2])
    assert places[-1] == 299 and len(places) == (most or len(places))
    np.testing.assert_allclose(np.array(found.keys)[0, 1, :, 5], places, atol=0.01)
    np.testing.assert_allclose(np.array(found.values)[0, 0, :, 0], -places, atol=0.01)


def test_which_caches_can_be_read() -> None:
    kept = RotatingKVCache(max_size=8, keep=4)
    assert not is_readable(kept) and not is_readable(KeepingCache(kept)) and not is_readable(object())
    assert is_readable(RotatingKVCache(max_size=8)) and is_readable(KVCache())
