"""What heads that do not wait for each other have in common: Medusa's and Meta's."""

from __future__ import annotations

import mlx.core as mx

from mtp_mlx.decode.draft_pick import pick_draft
from mtp_mlx.decode.drafter import LazyDrafts, Verified
from mtp_mlx.decode.pick import Picker
from mtp_mlx.drafters.heads.draft_heads import DraftHeads
from mtp_mlx.model.attach import AttachedModel


def pick_each(
    attached: AttachedModel, picker: Picker, heads: DraftHeads, refined: list[mx.array], verified: Verified
) -> LazyDrafts:
    """Drafts that do not depend on each other.

    Args:
        refined: [1, D] what the LM head of each depth reads.
        verified: what the pass says.
    """
    ids, confidences = [], []
    token, history = verified.pick.reshape(1), verified.history
    for depth, row in enumerate(refined, start=1):
        if history is not None:
            history = mx.concatenate([history[1:], token])
        token, confidence = pick_draft(
            attached, picker, row, (verified.position + depth).reshape(1), history, heads.unembedding(depth)
        )
        ids.append(token)
        confidences.append(confidence)
    return LazyDrafts(mx.concatenate(ids), mx.concatenate(confidences))
