"""Refuses, before anything runs, a prompt cache of another model and a KV quantisation that its heads do not allow.

What the model's own cache looks like is found by building one pass over one token, which is never evaluated.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import mlx.core as mx
from mlx_lm.models.cache import ArraysCache, CacheList, KVCache, RotatingKVCache

from mtp_mlx.errors import MTPError
from mtp_mlx.model.attach import AttachedModel
from mtp_mlx.model.block import Block
from mtp_mlx.model.window_cache import WindowCache

GROUP_SIZES = (32, 64, 128)  # those of mx.quantize
BITS = (2, 3, 4, 5, 6, 8)


@dataclass(frozen=True)
class _Sizes:
    """What one cache holds: the number of heads, and the widths of a key and of a value."""

    count: int
    key: int
    value: int


@dataclass(frozen=True)
class _State:
    """The shapes of a recurrent state."""

    shapes: tuple[tuple[int, ...], ...]


_known: WeakKeyDictionary[AttachedModel, list[list[_Sizes | _State | None]]] = WeakKeyDictionary()
_attends: WeakKeyDictionary[AttachedModel, bool] = WeakKeyDictionary()


def check_prompt_cache(model: AttachedModel, cache: list[Any]) -> None:
    """Checks that a cache has the layers of `model`, and that what it holds has their heads.

    Raises:
        MTPError: if it belongs to another model, or is of a kind that the model's exact rows cannot read.
    """
    own = model.make_cache()
    if model.exact and any(getattr(leaf, "keep", 0) for layer in cache for leaf in _leaves(layer)):
        raise MTPError(
            "exact decoding is not possible with a cache of limited size: leave `max_kv_size` or `exact` out"
        )
    if len(cache) != len(own):
        raise MTPError(
            f"`prompt_cache` has {len(cache)} layers and this model {len(own)}: make one for this model, "
            "or leave it out"
        )
    for index, (theirs, ours) in enumerate(zip(cache, own, strict=True)):
        if [_is_state(leaf) for leaf in _leaves(theirs)] != [_is_state(leaf) for leaf in _leaves(ours)]:
            raise MTPError(
                f"layer {index} of `prompt_cache` is of another kind of model: make one for this model, or leave it "
                "out"
            )
    held = [[_held(leaf) for leaf in _leaves(layer)] for layer in cache]
    if not any(heads for layer in held for heads in layer):
        return
    for index, (theirs, ours) in enumerate(zip(held, _own_heads(model), strict=True)):
        for found, wanted in zip(theirs, ours, strict=True):
            if found is not None and wanted is not None and found != wanted:
                raise MTPError(
                    f"layer {index} of `prompt_cache` holds {_text(found)}, this model {_text(wanted)}: "
                    "make one for this model, or leave it out"
                )


def check_quantisation(model: AttachedModel, cache: list[Any], bits: int | None, group_size: int) -> None:
    """Checks that a KV cache of the model can be quantised like this.

    Raises:
        MTPError: if it cannot, because of sliding windows, bits, groups or the model's attention; names a group size
            that fits, if there is one.
    """
    if bits is None:
        return
    if any(getattr(leaf, "keep", 0) for layer in cache for leaf in _leaves(layer)):
        raise MTPError(
            "a cache of limited size cannot be quantised (nor can it in mlx-lm): leave `kv_bits` or `max_kv_size` out"
        )
    if any(isinstance(leaf, WindowCache | RotatingKVCache) for layer in cache for leaf in _leaves(layer)):
        raise MTPError(
            "this model has sliding-window layers, whose cache cannot be quantised (nor can it in mlx-lm): "
            "leave `kv_bits` out"
        )
    if bits not in BITS:
        raise MTPError(f"`kv_bits` must be one of {', '.join(map(str, BITS))}, not {bits}")
    widths = {
        width
        for layer in _own_heads(model)
        for heads in layer
        if isinstance(heads, _Sizes)
        for width in (heads.key, heads.value)
    }
    fitting = [size for size in GROUP_SIZES if not any(width % size for width in widths)]
    if group_size in fitting:
        if not _attends_quantised(model, bits, group_size):
            raise MTPError(
                "this model's attention cannot read quantised keys and values (nor can it in mlx-lm): leave "
                "`kv_bits` out"
            )
        return
    sizes = " and ".join(map(str, sorted(widths)))
    remedy = f"use `kv_group_size` {fitting[-1]}" if fitting else "leave `kv_bits` out"
    raise MTPError(
        f"keys and values of {sizes} numbers cannot be quantised in groups of {group_size}: {remedy}"
    )


def _attends_quantised(model: AttachedModel, bits: int, group_size: int) -> bool:
    """Whether a pass over a quantised cache can be built."""
    if model not in _attends:
        before = model.head_input
        cache = [
            layer.to_quantized(group_size=group_size, bits=bits) if isinstance(layer, KVCache) else layer
            for layer in model.make_cache()
        ]
        try:
            model.forward(Block.real(mx.zeros((1, 1), dtype=mx.int32)), cache)
            _attends[model] = True
        except (
            TypeError,
            ValueError,
            AttributeError,
        ):  # its own attention calls MLX with the three parts of the keys
            _attends[model] = False
        model.head_input = before
    return _attends[model]


def _own_heads(model: AttachedModel) -> list[list[_Sizes | _State | None]]:
    """By layer and cache of it."""
    if model in _known:
        return _known[model]
    cache, before = model.make_cache(), model.head_input
    model.forward(Block.real(mx.zeros((1, 1), dtype=mx.int32)), cache)
    model.head_input = before
    _known[model] = [[_held(leaf) for leaf in _leaves(layer)] for layer in cache]
    return _known[model]


def _leaves(layer: Any) -> tuple[Any, ...]:
    return tuple(layer.caches) if isinstance(layer, CacheList) else (layer,)


def _is_state(leaf: Any) -> bool:
    """Whether it holds a recurrent state instead of keys and values."""
    return isinstance(leaf, ArraysCache)


def _held(leaf: Any) -> _Sizes | _State | None:
    """None if nothing is held yet."""
    keys, values = getattr(leaf, "keys", None), getattr(leaf, "values", None)
    if _is_state(leaf):
        held = [array for array in leaf.cache if array is not None]
        return _State(tuple(tuple(array.shape) for array in held)) if held else None
    if keys is None or values is None:
        return None
    first = keys[0] if isinstance(keys, tuple | list) else keys
    return _Sizes(int(first.shape[1]), _width(leaf, keys), _width(leaf, values))


def _width(leaf: Any, held: Any) -> int:
    """Numbers of a head; a quantised cache packs them into words of 32 bits."""
    if isinstance(held, tuple | list):
        return int(held[0].shape[-1]) * 32 // int(leaf.bits)
    return int(held.shape[-1])


def _text(heads: _Sizes | _State) -> str:
    if isinstance(heads, _State):
        return "a state of " + ", ".join(" x ".join(map(str, shape)) for shape in heads.shapes) + " numbers"
    return f"{heads.count} heads of {heads.key} and {heads.value} numbers"
