"""What all heads that draft behind a trunk have in common, whatever their form. Their own forms are in

mtp_head.py        a cascade, each head behind the one before it (DeepSeek-V3's form)
medusa_head.py     independent residual layers on the trunk's last hidden state
parallel_head.py   independent decoder layers on the state before the trunk's last layer (Meta)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mtp_mlx.drafters.heads.convention import HeadConvention
from mtp_mlx.model.head import select_rows


class DraftHeads(nn.Module):
    """Heads of one model.

    Args:
        heads: K heads, in order.
        convention: how they are run.
        draft_ids: [N] int32 ids that may be drafted, or None for all.
        drafts: tokens drafted in each step, by default one per head.

    """

    heads: list[Any]

    def __init__(
        self,
        heads: Sequence[nn.Module],
        convention: HeadConvention,
        draft_ids: mx.array | None = None,
        drafts: int = 0,
    ) -> None:
        super().__init__()
        self.heads = list(heads)
        self._convention, self._draft_ids = convention, draft_ids
        self._drafts = drafts or len(heads)
        self._unembeddings: dict[int, nn.Module] = {}

    @property
    def drafts(self) -> int:
        """Tokens drafted in each step."""
        return self._drafts

    @property
    def most_drafts(self) -> int | None:
        """Tokens that they can draft in a step at most; None where heads can be applied again in turn."""
        return None

    @property
    def convention(self) -> HeadConvention:
        """How the heads are run."""
        return self._convention

    @property
    def draft_ids(self) -> mx.array | None:
        """[N] int32 ids that may be drafted, or None for the whole vocabulary."""
        return self._draft_ids

    def unembedding(self, depth: int) -> nn.Module | None:
        """The LM head of the head at `depth` (from 1), [..., D] -> [..., V], or N columns with a draft vocabulary.

        None where it is shared with the trunk.
        """
        index = (depth - 1) % len(self.heads)
        head = self.heads[index]
        if "lm_head" not in head or self._draft_ids is None:
            return head.get("lm_head")
        if index not in self._unembeddings:
            self._unembeddings[index] = select_rows(head.lm_head, self._draft_ids)
        return self._unembeddings[index]


class IndependentHeads(DraftHeads):
    """Heads that do not wait for each other; head i makes draft i, so there are no more drafts than heads."""

    @property
    def most_drafts(self) -> int:
        """See `DraftHeads`."""
        return len(self.heads)
