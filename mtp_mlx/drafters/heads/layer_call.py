"""A decoder layer apart from its trunk: whether it can run so, how it is called, and which caches it fills.

Most layers of mlx-lm are called as layer(x, mask, cache) and return hidden states. Some keep the keys and values of
several attentions, or return more. Others take what only their trunk has (masks of recurrent state, keys and values
of another layer), or keep recurrent state, from which a rejected draft cannot be taken back.

What a layer does is found by building calls of it, which are never evaluated.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.cache import CacheList, KVCache

from mtp_mlx.errors import MTPError

ROWS = 2  # of a call that is only built
MOST_PARTS = 2  # attentions of one layer


@dataclass(frozen=True)
class LayerCall:
    """How a decoder layer is called.

    Attributes:
        parts: key-value caches that it takes, 0 for a layer without attention.
        scaled: whether it must be given a scale of its queries (`attn_scale`), by which some models see further than
            they were trained for. It is one here, as it is within that length.
        named: whether it takes `mask` and `cache` by these names; otherwise in this order.
    """

    parts: int
    scaled: bool = False
    named: bool = True

    def make_cache(self) -> Any:
        """An empty cache as the layer takes it."""
        return CacheList(*(KVCache() for _ in range(self.parts))) if self.parts > 1 else KVCache()

    def __call__(self, layer: Any, x: mx.array, mask: Any, cache: Any) -> mx.array:
        """The hidden states that the layer returns, [B, T, D] -> [B, T, D]."""
        if not self.named:
            return _hidden(layer(x, mask, cache))
        extra = {"attn_scale": mx.ones((1,), x.dtype)} if self.scaled else {}
        return _hidden(layer(x, mask=mask, cache=cache, **extra))


def cache_parts(cache: Any) -> tuple[Any, ...]:
    """The key-value caches of one layer."""
    return tuple(cache.caches) if isinstance(cache, CacheList) else (cache,)


def layer_call(layer: nn.Module, hidden_size: int) -> LayerCall:
    """How `layer` is called apart from its trunk.

    Args:
        layer: a decoder layer, not wrapped.
        hidden_size: D.

    Raises:
        MTPError: if it cannot run so; the message is a clause that says why.
    """
    given = list(inspect.signature(type(layer).__call__).parameters.values())[2:]  # behind self and x
    names = {one.name for one in given}
    named = {"mask", "cache"} <= names
    needed = [one.name for one in given if one.default is one.empty and one.kind is one.POSITIONAL_OR_KEYWORD]
    foreign = [name for name in needed if name not in ("mask", "cache", "attn_scale")]
    if named and foreign:
        raise MTPError(f"it takes `{foreign[0]}` from the trunk")
    x = mx.zeros((1, ROWS, hidden_size))
    mask = mx.tril(mx.ones((ROWS, ROWS), dtype=mx.bool_))
    for parts in range(1, MOST_PARTS + 1):
        call = LayerCall(parts, "attn_scale" in needed, named)
        cache = call.make_cache()
        try:
            fits = all(call(layer, x, mask, kept).shape == x.shape for kept in (cache, None))
        except Exception:  # noqa: BLE001, S112 - layers of mlx-lm raise anything when called as they are not meant to be
            continue
        filled = {int(part.offset) for part in cache_parts(cache)}
        if fits and ROWS in filled and filled <= {0, ROWS}:
            return call
        if fits and filled == {0}:
            return LayerCall(0, call.scaled, named)
    raise MTPError("it keeps recurrent state, or takes what another layer computes")


def _hidden(returned: Any) -> mx.array:
    """The hidden states among what a layer returned: gemma4's and kimi_k3's return more."""
    return returned[0] if isinstance(returned, tuple) else returned
