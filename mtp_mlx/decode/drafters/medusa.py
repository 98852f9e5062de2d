"""Drafts from Medusa's heads: all of them from the hidden state of the newest row, so there is nothing to keep."""

from __future__ import annotations

import mlx.core as mx

from mtp_mlx.decode.drafters.head_drafter import drafts_of, pick_each
from mtp_mlx.decode.pick import Picker
from mtp_mlx.model.attach import AttachedModel
from mtp_mlx.model.medusa_head import MedusaHeads


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
