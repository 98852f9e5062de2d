"""What heads that do not wait for each other have in common: Medusa's and Meta's."""

from __future__ import annotations

import mlx.core as mx

from mtp_mlx.decode.draft_pick import pick_draft
from mtp_mlx.decode.pick import Picker
from mtp_mlx.drafters.heads.draft_heads import DraftHeads, IndependentHeads
from mtp_mlx.errors import MTPError
from mtp_mlx.model.attach import AttachedModel


def drafts_of(heads: IndependentHeads, asked: int | None) -> int:
    """How many tokens independent heads draft in a step: what was asked for, else what they are set to.

    Raises:
        MTPError: more than there are heads.
    """
    drafts = asked or heads.drafts
    if drafts > len(heads.heads):
        raise MTPError(f"{len(heads.heads)} heads of this form cannot draft {drafts} tokens in a step")
    return drafts


def pick_each(
    attached: AttachedModel,
    picker: Picker,
    heads: DraftHeads,
    refined: list[mx.array],
    pick: mx.array,
    position: mx.array,
    history: mx.array | None,
) -> tuple[mx.array, mx.array]:
    """Ids and confidences [count] of drafts that do not depend on each other, lazily.

    Args:
        refined: [1, D] what the LM head of each depth reads.
        pick: int32 scalar, the target's own pick, at `position` (a scalar).
        history: [C] int32 tokens before it, or None without penalties.
    """
    ids, confidences = [], []
    token = pick.reshape(1)
    for depth, row in enumerate(refined, start=1):
        if history is not None:
            history = mx.concatenate([history[1:], token])
        token, confidence = pick_draft(
            attached, picker, row, (position + depth).reshape(1), history, heads.unembedding(depth)
        )
        ids.append(token)
        confidences.append(confidence)
    return mx.concatenate(ids), mx.concatenate(confidences)
