"""Picks a draft from a hidden state, with the target's noise."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn

from mtp_mlx.decode.pick import Picker
from mtp_mlx.model.attach import AttachedModel
from mtp_mlx.model.head import Vocabulary


def pick_draft(
    attached: AttachedModel,
    picker: Picker,
    refined: mx.array,
    position: mx.array,
    history: mx.array | None,
    unembedding: nn.Module | None = None,
    vocabulary: Vocabulary | None = None,
    width: int = 1,
) -> tuple[mx.array, mx.array]:
    """(ids int32 [w], confidences float32 [w]) of a draft and of other candidates for its position, lazily.

    Args:
        attached: the model.
        picker: the target's picker; the same noise at the same position couples drafts to the target.
        refined: [1, D] the input of the LM head.
        position: [1] int32, absolute position of the draft.
        history: [C] int32 tokens before the draft, or None without penalties.
        unembedding: the drafter's own LM head over the draft vocabulary; None for the model's head.
        vocabulary: the tokens to pick from with the model's head; None for the draft vocabulary.
        width: w, the draft and w - 1 others, likeliest first.
    """
    row = None if history is None else history[None]
    if width > 1:
        token_ids = attached.draft_ids if vocabulary is None else vocabulary.ids
        head = unembedding or (vocabulary or attached.draft_vocabulary).head
        ids, confidences = picker.candidates(head(refined), position, row, token_ids, width)
        return ids[0], confidences[0]
    if unembedding is not None:
        return picker.pick_with_confidence(unembedding(refined), position, row, attached.draft_ids)
    vocabulary = vocabulary or attached.draft_vocabulary
    head, kernels, token_ids = vocabulary.head, attached.kernels, vocabulary.ids
    if kernels is not None and head.matrix is not None and picker.draws_plainly(head.columns):
        found = kernels.attempt(
            "lm_head_pick",
            refined,
            *head.matrix_arguments,
            picker.config.temperature,
            picker.noise_keys(position),
            token_ids,
        )
        if found is not None:
            return found
    return picker.pick_with_confidence(head(refined), position, row, token_ids)
