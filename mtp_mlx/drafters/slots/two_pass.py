"""The two passes of training slots (design 2.4); the base model itself is the teacher, at no cost.

Pass 1 runs the base model, without the adapter, over the text and keeps its KV and hidden states as constants.
Pass 2 runs the slot rows alone against that KV, with gradients.
"""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from mtp_mlx.drafters.slots.layout import SlotLayout
from mtp_mlx.model.attach import AttachedModel
from mtp_mlx.model.block import Block
from mtp_mlx.model.cache import PrefixCache

# Their attention has an axis of repeated heads, against which a mask per sequence does not broadcast.
ONE_MASK_MODELS = frozenset({"gemma2", "phi3small"})


@dataclass(frozen=True)
class Prefix:
    """Results of pass 1; constants.

    Attributes:
        caches: the base model's KV, one per layer.
        hidden: [S * T, D] final hidden states of the real rows.
    """

    caches: list[PrefixCache]
    hidden: mx.array

    def arrays(self) -> list[mx.array]:
        """Everything that pass 2 reads, for evaluation."""
        stored = [part for cache in self.caches for part in (cache.keys, cache.values) if part is not None]
        return [self.hidden, *stored]


def prefix_pass(attached: AttachedModel, layout: SlotLayout) -> Prefix:
    """Pass 1 over the S sequences of a batch; lazy. Evaluating `Prefix.arrays` frees its graph."""
    caches = [PrefixCache() for _ in range(len(attached.model.layers))]
    hidden = attached.forward(Block.real(mx.array(layout.tokens)), caches)  # [S, T, D]
    hidden = hidden.reshape(-1, hidden.shape[-1])
    return Prefix(caches=caches, hidden=hidden)


def slot_pass(
    attached: AttachedModel, layout: SlotLayout, prefix: Prefix, uniforms: np.ndarray | None = None
) -> mx.array:
    """Pass 2: hidden states of the supervised slot rows, [M, D]; differentiable in the adapter.

    Args:
        uniforms: [S * chunks, C] float32, what the slots carry (Parallel Token Prediction only).
    """
    return every_slot_pass(attached, layout, prefix, uniforms)[mx.array(layout.rows)]


def every_slot_pass(
    attached: AttachedModel, layout: SlotLayout, prefix: Prefix, uniforms: np.ndarray | None = None
) -> mx.array:
    """Pass 2: hidden states of all slot rows, [S * R, D], supervised or not."""
    ids = mx.array(layout.slot.reshape(-1, layout.chunk_rows) + attached.vocab_size)
    return _pass_behind(attached, layout, prefix, ids, n_real=0, uniforms=uniforms)


def token_pass(attached: AttachedModel, layout: SlotLayout, prefix: Prefix, tokens: mx.array) -> mx.array:
    """Hidden states of the base model over tokens in place of the slots, with the same visibility, [S * R, D].

    Args:
        tokens: [S * R] int32, in the order of the slot rows.
    """
    ids = tokens.reshape(len(layout.positions()), -1)
    return _pass_behind(attached, layout, prefix, ids, n_real=ids.shape[1])


def _pass_behind(
    attached: AttachedModel,
    layout: SlotLayout,
    prefix: Prefix,
    ids: mx.array,
    n_real: int,
    uniforms: np.ndarray | None = None,
) -> mx.array:
    """Hidden states [S * R, D] of `ids` [S * chunks, C] behind the prefix."""
    positions = layout.positions()
    visibility = layout.visibility()
    if getattr(attached.model, "model_type", "") in ONE_MASK_MODELS:
        pieces = []
        for row in range(len(positions)):
            caches = _prefix_of(prefix, row, layout)
            mask = mx.array(visibility[row])  # [C, T + C]
            own = slice(row, row + 1)
            carried = None if uniforms is None else uniforms[own]
            pieces.append(
                _chunks_pass(attached, positions[own], mask, caches, ids[own], n_real, uniforms=carried)
            )
        hidden = mx.concatenate(pieces)
    else:
        mask = mx.array(visibility)[:, None]  # [S * chunks, 1, C, T + C]
        caches = [_behind(cache.keys, cache.values) for cache in prefix.caches]
        hidden = _chunks_pass(attached, positions, mask, caches, ids, n_real, layout.chunks, uniforms)
    return hidden.reshape(-1, hidden.shape[-1])


def _chunks_pass(
    attached: AttachedModel,
    positions: np.ndarray,
    mask: mx.array,
    caches: list[PrefixCache],
    ids: mx.array,
    n_real: int,
    repeats: int = 1,
    uniforms: np.ndarray | None = None,
) -> mx.array:
    """Hidden states [B, C, D] of chunks whose rows have `positions` [B, C]."""
    for cache in caches:
        cache.mask, cache.repeats = mask, repeats
    carried = None if uniforms is None else mx.array(uniforms)
    block = Block(ids=ids, n_real=n_real, positions=mx.array(positions), uniforms=carried)
    return attached.forward(block, caches)


def _prefix_of(prefix: Prefix, row: int, layout: SlotLayout) -> list[PrefixCache]:
    """The prefix of chunk `row`, as views of the whole prefix's keys and values."""
    own = slice(row // layout.chunks, row // layout.chunks + 1)
    return [
        _behind(cache.keys[own], cache.values[own])
        for cache in prefix.caches
        if cache.keys is not None and cache.values is not None
    ]


def _behind(keys: mx.array | None, values: mx.array | None) -> PrefixCache:
    """A new cache that starts with these keys and values."""
    cache = PrefixCache()
    cache.keys, cache.values = keys, values
    return cache
