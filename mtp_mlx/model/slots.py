"""Slot embeddings: ids at and above the vocabulary size are slots, k distinct ones (arXiv 2507.11851, section 2).

The base embedding table is not grown: the wrapper adds rows behind it, so the LM head, the tokenizer and
a quantised table stay as they are.
"""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn


class SlotEmbeddings(nn.Module):
    """k trained vectors. Args: count k, hidden size D, initial vector [D] shared by all before noise is added."""

    def __init__(self, count: int, hidden_size: int, initial: mx.array | None = None) -> None:
        super().__init__()
        noise = mx.random.normal((count, hidden_size)) * 0.02
        self.weight = noise if initial is None else initial.astype(mx.float32)[None] + noise  # [k, D]

    def __call__(self, slots: mx.array) -> mx.array:
        """Embeddings of 0-based slots: [...] int -> [..., D]."""
        return self.weight[slots]


class SharedMask(SlotEmbeddings):
    """One trained vector for all slots: the single mask token of arXiv 2602.06019. `count` is not used."""

    def __init__(self, count: int, hidden_size: int, initial: mx.array | None = None) -> None:
        super().__init__(1, hidden_size, initial)

    def __call__(self, slots: mx.array) -> mx.array:
        """The same [D] for every slot: [...] int -> [..., D]."""
        return mx.broadcast_to(self.weight[0], (*slots.shape, self.weight.shape[-1]))


class SlotAwareEmbedding(nn.Module):
    """The model's own embedding, with slot ids answered by `SlotEmbeddings`."""

    def __init__(self, base: nn.Module, slots: SlotEmbeddings, vocab_size: int) -> None:
        super().__init__()
        self.base = base
        self.slots = slots
        self._vocab_size = vocab_size

    def __call__(self, ids: mx.array) -> mx.array:
        """[B, R] int ids -> [B, R, D]."""
        ids = ids.astype(mx.int32)  # argmax gives uint32, whose differences wrap around
        real = self.base(mx.minimum(ids, self._vocab_size - 1))
        slot_ids = mx.maximum(ids - self._vocab_size, 0)
        slot = self.slots(slot_ids).astype(real.dtype)
        return mx.where((ids < self._vocab_size)[..., None], real, slot)

    def as_linear(self, hidden: mx.array) -> mx.array:
        """The tied LM head: [..., D] -> [..., V]. Slots are never predicted."""
        return self.base.as_linear(hidden)

    @property
    def weight(self) -> mx.array:
        """The base table, [V, D] (packed if quantised)."""
        return self.base.weight
