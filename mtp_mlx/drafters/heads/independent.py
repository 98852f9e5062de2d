"""What heads that do not depend on each other have in common: Medusa's and Meta's."""

from __future__ import annotations

import mlx.core as mx

from mtp_mlx.decode.draft_pick import Beams, pick_draft
from mtp_mlx.decode.drafter import LazyDrafts, Verified
from mtp_mlx.decode.pick import Picker
from mtp_mlx.drafters.heads.draft_heads import DraftHeads
from mtp_mlx.model.attach import AttachedModel


def pick_each(
    attached: AttachedModel, picker: Picker, heads: DraftHeads, refined: list[mx.array], verified: Verified
) -> LazyDrafts:
    """Picks a draft for each depth, or the candidates of a tree, independently of the drafts before.

    In a tree a head's candidates are the same behind all drafts of the depth before, except for penalties; the
    likeliest paths are kept (arXiv 2401.10774, section 2.1.2: products of the heads' top choices).

    Args:
        attached: the model to draft for.
        picker: the target's picker.
        heads: all heads of the model.
        refined: per depth, the input [1, D] of the LM head.
        verified: the outcome of the pass.
    """
    if verified.layout.width > 1:
        beams = Beams(verified)
        for depth, row in enumerate(refined, start=1):
            beams.grow(picker, heads.logits(attached, row, depth), attached.draft_ids)
        return beams.drafts()
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
        )
        ids.append(token)
        confidences.append(confidence)
    return LazyDrafts.joined(ids, confidences)
