"""Medusa's heads (arXiv 2401.10774, 2.1.1): each reads the trunk's last hidden state alone.

Head i (from 1) turns the state h behind token t into

    x = h;  x = x + silu(W_j x + b_j)  for each residual layer j;  logits = LM head of its own (x)

and predicts token t + 1 + i. There is no chain and no cache: the state at the newest row is all that is needed.
Legend: D hidden size, V vocabulary.
"""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn

from mtp_mlx.decode.pick import Picker
from mtp_mlx.drafters.heads.draft_heads import IndependentHeads
from mtp_mlx.drafters.heads.independent import drafts_of, pick_each
from mtp_mlx.model.attach import AttachedModel


class MedusaHead(nn.Module):
    """One head.

    Args:
        layers: number of residual layers.
        hidden_size: D. vocab_size: V.
    """

    def __init__(self, layers: int, hidden_size: int, vocab_size: int) -> None:
        super().__init__()
        self.residual = [nn.Linear(hidden_size, hidden_size) for _ in range(layers)]
        self.lm_head = nn.Linear(hidden_size, vocab_size, bias=False)

    def __call__(self, hidden: mx.array) -> mx.array:
        """What the LM head reads, [..., D] -> [..., D]."""
        for layer in self.residual:
            hidden = hidden + nn.silu(layer(hidden))
        return hidden


class MedusaHeads(IndependentHeads):
    """All heads of a model."""

    heads: list[MedusaHead]


class MedusaDrafter:
    """A `HeadDrafter` of a model with Medusa's heads. Arguments as `HeadChain`."""

    def __init__(
        self, attached: AttachedModel, picker: Picker, drafts: int | None = None, first_position: int = 0
    ) -> None:
        heads = attached.mtp_heads
        if not isinstance(heads, MedusaHeads):
            raise ValueError("this drafter needs Medusa's heads")
        self._attached, self._picker, self._heads = attached, picker, heads
        self.max_drafts = drafts_of(heads, drafts)

    def observe(self, hidden: mx.array, tokens: list[int]) -> None:
        """Nothing to note: earlier rows do not matter."""

    def catch_up(self, tokens: list[int]) -> None:
        """Nothing waits."""

    def propose(
        self,
        hidden: mx.array,
        picks: mx.array,
        accepted: mx.array,
        position: mx.array,
        history: mx.array | None,
        tokens: list[int],
        count: int,
    ) -> tuple[mx.array, mx.array]:
        """See `HeadDrafter.propose`."""
        newest = hidden[0, accepted][None]  # [1, D]
        refined = [head(newest) for head in self._heads.heads[:count]]
        return pick_each(
            self._attached, self._picker, self._heads, refined, picks[accepted], position, history
        )

    def commit(self, n_accepted: int) -> None:
        """Nothing was kept."""
