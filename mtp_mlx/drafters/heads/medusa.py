"""Medusa's heads (arXiv 2401.10774, section 2.1.1): each reads only the trunk's last hidden state.

Head i (from 1) maps the hidden state h at token t to

    x = h;  x = x + silu(W_j x + b_j)  for each residual layer j;  logits = own LM head (x)

and predicts token t + 1 + i. There is no chain and no cache: only the newest row's hidden state is needed.
Legend: D hidden size, V vocabulary.
"""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn

from mtp_mlx.decode.drafter import Drafter, LazyDrafts, Verified
from mtp_mlx.decode.pick import Picker
from mtp_mlx.drafters.heads.draft_heads import IndependentHeads
from mtp_mlx.drafters.heads.independent import pick_each
from mtp_mlx.model.attach import AttachedModel


class MedusaHead(nn.Module):
    """One head.

    Args:
        layers: number of residual layers.
        hidden_size: D.
        vocab_size: V.
    """

    def __init__(self, layers: int, hidden_size: int, vocab_size: int) -> None:
        super().__init__()
        self.residual = [nn.Linear(hidden_size, hidden_size) for _ in range(layers)]
        self.lm_head = nn.Linear(hidden_size, vocab_size, bias=False)

    @property
    def layers(self) -> list[nn.Module]:
        """The residual layers, in order."""
        return [*self.residual]

    def __call__(self, hidden: mx.array) -> mx.array:
        """The input of the LM head, [..., D] -> [..., D]."""
        for layer in self.residual:
            hidden = hidden + nn.silu(layer(hidden))
        return hidden


class MedusaHeads(IndependentHeads):
    """The Medusa heads of a model."""

    heads: list[MedusaHead]

    def open(
        self, attached: AttachedModel, picker: Picker, drafts: int, start: int, *, verified: bool = True
    ) -> MedusaDrafter:
        """See `DraftSource`."""
        self.check_drafts(drafts)
        return MedusaDrafter(attached, picker, self)

    def over_states(self, attached: AttachedModel, head: MedusaHead, states: mx.array) -> mx.array:
        """See `IndependentHeads`."""
        return head(states)


class MedusaDrafter(Drafter):
    """Drafts with Medusa's heads for one generation; it has no state, since earlier rows do not matter."""

    def __init__(self, attached: AttachedModel, picker: Picker, heads: MedusaHeads) -> None:
        self._attached, self._picker, self._heads = attached, picker, heads

    def propose(self, verified: Verified) -> LazyDrafts:
        """See `Drafter`."""
        newest = verified.head_input[0, verified.accepted][None]  # [1, D]
        refined = [head(newest) for head in self._heads.heads[: verified.layout.chain]]
        return pick_each(self._attached, self._picker, self._heads, refined, verified)
