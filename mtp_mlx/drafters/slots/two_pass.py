"""The two passes of training slots (design 2.4); the base model itself is the teacher, at no cost.

Pass 1 runs the base model, without the adapter, over the text and keeps its KV and hidden states as constants.
Pass 2 runs the slot rows alone against that KV, with gradients, in slices: no slot sees another block's, so slices
add up to the whole (design 2.8).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np
from mlx_lm.models.cache import CacheList

from mtp_mlx.drafters.slots.layout import Part, SlotLayout
from mtp_mlx.model.attach import AttachedModel
from mtp_mlx.model.block import Block
from mtp_mlx.model.cache import PrefixCache, prefix_caches
from mtp_mlx.model.seams import cache_leaves
from mtp_mlx.model.text_states import BlockStates, TextStates

# Their attention has an axis of repeated heads, against which a mask per sequence does not broadcast.
ONE_MASK_MODELS = frozenset({"gemma2"})


@dataclass(frozen=True)
class Prefix:
    """Results of pass 1; constants.

    Attributes:
        caches: the base model's KV and what its recurrent states are made from, per layer a `PrefixCache`, a
            `TextStates` or a list of them.
        hidden: [S * T, D] final hidden states of the real rows.
    """

    caches: list[Any]
    hidden: mx.array

    def arrays(self) -> list[mx.array]:
        """Everything that pass 2 reads, for evaluation."""
        leaves = [leaf for _, leaf in cache_leaves(self.caches)]
        return [self.hidden, *(array for leaf in leaves for array in leaf.arrays())]


def prefix_pass(attached: AttachedModel, layout: SlotLayout) -> Prefix:
    """Pass 1 over the S sequences of a batch; lazy. Evaluating `Prefix.arrays` frees its graph."""
    caches = prefix_caches(attached.model)
    hidden = attached.forward(Block.real(mx.array(layout.tokens)), caches)  # [S, T, D]
    hidden = hidden.reshape(-1, hidden.shape[-1])
    for _, leaf in cache_leaves(caches):
        if isinstance(leaf, TextStates):
            leaf.end()
    return Prefix(caches=caches, hidden=hidden)


def slot_pass(
    attached: AttachedModel,
    layout: SlotLayout,
    prefix: Prefix,
    part: Part,
    uniforms: np.ndarray | None = None,
) -> mx.array:
    """Pass 2: hidden states of the supervised slot rows of a slice, [m, D]; differentiable in the adapter.

    Args:
        uniforms: [S * chunks, C] float32, what the slots carry (Parallel Token Prediction only).
    """
    first = part.chunks.start * layout.chunk_rows
    rows = mx.array(layout.rows[part.rows] - first)
    return every_slot_pass(attached, layout, prefix, part, uniforms)[rows]


def every_slot_pass(
    attached: AttachedModel,
    layout: SlotLayout,
    prefix: Prefix,
    part: Part,
    uniforms: np.ndarray | None = None,
) -> mx.array:
    """Pass 2: hidden states of all slot rows of a slice, [chunks * C, D], supervised or not."""
    slot = layout.slot.reshape(-1, layout.chunk_rows)[part.chunks]
    ids = mx.array(slot + attached.vocab_size)
    own = None if uniforms is None else uniforms[part.chunks]
    return _pass_behind(attached, layout, prefix, part, ids, n_real=0, uniforms=own)


def slot_states(
    attached: AttachedModel,
    layout: SlotLayout,
    prefix: Prefix,
    uniforms: np.ndarray | None = None,
    most_rows: int | None = None,
) -> mx.array:
    """Hidden states of all supervised slot rows, [M, D], slice by slice and evaluated: constants.

    Args:
        uniforms: as in `slot_pass`.
        most_rows: as in `SlotLayout.parts`.
    """
    pieces = []
    for part in layout.parts(most_rows):
        pieces.append(slot_pass(attached, layout, prefix, part, uniforms))
        mx.eval(pieces[-1])
    return mx.concatenate(pieces)


def token_pass(
    attached: AttachedModel, layout: SlotLayout, prefix: Prefix, part: Part, tokens: mx.array
) -> mx.array:
    """Hidden states of the base model over tokens in place of a slice's slots, with the same visibility.

    Args:
        tokens: [chunks * C] int32, in the order of the slot rows.

    Returns:
        [chunks * C, D].
    """
    ids = tokens.reshape(part.count, -1)
    return _pass_behind(attached, layout, prefix, part, ids, n_real=ids.shape[1])


def _pass_behind(
    attached: AttachedModel,
    layout: SlotLayout,
    prefix: Prefix,
    part: Part,
    ids: mx.array,
    n_real: int,
    uniforms: np.ndarray | None = None,
) -> mx.array:
    """Hidden states [chunks * C, D] of `ids` [chunks, C] behind the prefix of a slice."""
    positions = layout.positions()[part.chunks]
    visibility = layout.visibility(part.chunks)
    seen = layout.seen(part.chunks)
    if getattr(attached.model, "model_type", "") in ONE_MASK_MODELS:
        pieces = []
        for row in range(part.count):
            caches = _behind(prefix, layout, part, seen)
            mask = mx.array(visibility[row])  # [C, t + C]
            own = slice(row, row + 1)
            carried = None if uniforms is None else uniforms[own]
            pieces.append(
                _chunks_pass(attached, positions[own], mask, caches, ids[own], n_real, uniforms=carried)
            )
        hidden = mx.concatenate(pieces)
    else:
        mask = mx.array(visibility)[:, None]  # [chunks, 1, C, t + C]
        caches = _behind(prefix, layout, part, seen)
        hidden = _chunks_pass(attached, positions, mask, caches, ids, n_real, part.count, uniforms)
    return hidden.reshape(-1, hidden.shape[-1])


def _chunks_pass(
    attached: AttachedModel,
    positions: np.ndarray,
    mask: mx.array,
    caches: list[Any],
    ids: mx.array,
    n_real: int,
    repeats: int = 1,
    uniforms: np.ndarray | None = None,
) -> mx.array:
    """Hidden states [B, C, D] of chunks whose rows have `positions` [B, C]."""
    for _, leaf in cache_leaves(caches):
        if isinstance(leaf, PrefixCache):
            leaf.mask, leaf.repeats = mask, repeats
    carried = None if uniforms is None else mx.array(uniforms)
    block = Block(ids=ids, n_real=n_real, positions=mx.array(positions), uniforms=carried)
    return attached.forward(block, caches)


def _behind(prefix: Prefix, layout: SlotLayout, part: Part, seen: int) -> list[Any]:
    """New caches for a slice: the first `seen` keys and values of its sequence, as views, and its blocks' states."""
    sequence = part.sequence
    anchors, lengths = layout.blocks(part)

    def start(stored: Any) -> Any:
        if isinstance(stored, CacheList):
            return CacheList(*(start(cache) for cache in stored.caches))
        if isinstance(stored, TextStates):
            return BlockStates(stored.at(sequence, anchors.tolist()), lengths)
        cache = PrefixCache()
        if stored.keys is not None and stored.values is not None:
            own = slice(sequence, sequence + 1)
            cache.keys, cache.values = stored.keys[own, :, :seen], stored.values[own, :, :seen]
        return cache

    return [start(stored) for stored in prefix.caches]
