"""What heads that do not depend on each other have in common: Medusa's and Meta's."""

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
    """Picks a draft for each depth, independently of each other.

    Args:
        attached: the model to draft for.
        picker: the target's picker.
        heads: all heads of the model.
        refined: per depth, the input [1, D] of the LM head.
        verified: the outcome of the pass.
    """
    ids, confidences = [], []
    token, history = verified.pick.reshape(1), verified.history
    for depth, row in enumerate(refined, start=1):
        if history is not None:
            history = mx.concatenate([history[1:], token])
        token, confidence = pick_draft(
            attached,
            picker,
            row,
            (verified.position + depth).reshape(1),
            history,
            heads.unembedding(depth),
            width=verified.layout.width,
        )
        ids.append(token)
        confidences.append(confidence)
        token = token[:1]
    return LazyDrafts.joined(ids, confidences)
