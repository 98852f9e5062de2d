"""Proves that the attention kernel is asked only where a layer attends to what its own cache holds."""

from __future__ import annotations

import mlx.core as mx
import pytest
from mlx_lm.models.cache import KVCache

from mtp_mlx.model import block_attention
from mtp_mlx.model.cache import BlockCache
from mtp_mlx.model.rows import RowContext


@pytest.mark.parametrize("held", [0, 3, 5])
def test_keys_of_another_layer(held: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Hunyuan's odd layers attend to the keys of the layer before; their own cache stays empty."""
    asked: list[int] = []
    monkeypatch.setattr(block_attention, "_by_kernel", lambda *_: asked.append(held))
    queries, keys = mx.random.normal((1, 4, 2, 16)), mx.random.normal((1, 2, 5, 16))
    cache = KVCache()
    if held:
        cache.update_and_fetch(keys[:, :, :held], keys[:, :, :held])
    view = BlockCache(cache, RowContext())
    out = block_attention.scaled_dot_product_attention(queries, keys, keys, view, 0.25, None)
    assert asked == ([5] if held == 5 else [])
    assert mx.array_equal(out, mx.fast.scaled_dot_product_attention(queries, keys, keys, scale=0.25))
