"""The two passes of mask-token training (design 2.4): the teacher is the base model itself, and free.

Pass 1 runs the base (gate closed) over the text without gradients and keeps its KV and hidden states.
Pass 2 runs only slot rows against that KV, with gradients; backward touches slot rows alone.
"""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from mtp_mlx.model.attach import AttachedModel
from mtp_mlx.model.block import Block
from mtp_mlx.model.cache import PrefixCache
from mtp_mlx.train.slot_layout import SlotLayout


@dataclass(frozen=True)
class Prefix:
    """What pass 1 leaves: constants of the step.

    Attributes:
        caches: the base model's KV, one per layer.
        hidden: [S * T, D] final hidden states of the real rows.
    """

    caches: list[PrefixCache]
    hidden: mx.array

    def arrays(self) -> list[mx.array]:
        """Everything pass 2 reads, for evaluation."""
        stored = [part for cache in self.caches for part in (cache.keys, cache.values) if part is not None]
        return [self.hidden, *stored]


def prefix_pass(attached: AttachedModel, layout: SlotLayout) -> Prefix:
    """Pass 1 over the S sequences of the batch; lazy. Evaluate `Prefix.arrays` before pass 2 to free its graph."""
    caches = [PrefixCache() for _ in range(len(attached.model.layers))]
    hidden = attached.forward(Block.real(mx.array(layout.tokens)), caches)  # [S, T, D]
    hidden = hidden.reshape(-1, hidden.shape[-1])
    return Prefix(caches=caches, hidden=hidden)


def slot_pass(attached: AttachedModel, layout: SlotLayout, prefix: Prefix) -> mx.array:
    """Pass 2: hidden states of the supervised slot rows, [M, D]. Differentiable in the adapter."""
    positions = layout.positions()
    visibility = mx.array(layout.visibility())
    # One chunk in all: a plain [R, T + R] mask, which every attention of mlx-lm takes (soft-capped ones too).
    mask = visibility[0] if len(positions) == 1 else visibility[:, None]
    for cache in prefix.caches:
        cache.mask, cache.repeats = mask, layout.chunks
    slot = np.tile(np.arange(layout.slots, dtype=np.int32), layout.chunk_blocks)
    ids = mx.broadcast_to(mx.array(slot + attached.vocab_size), positions.shape)
    block = Block(ids=ids, n_real=0, positions=mx.array(positions))
    hidden = attached.forward(block, prefix.caches)  # [S * chunks, G * k, D]
    return hidden.reshape(-1, hidden.shape[-1])[mx.array(layout.rows)]
