"""Picks drafts with the target's noise: one from a hidden state, or the candidates that a tree grows by."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn

from mtp_mlx.decode.drafter import LazyDrafts, Verified
from mtp_mlx.decode.pick import Picker
from mtp_mlx.decode.tree import ROOT
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
) -> tuple[mx.array, mx.array]:
    """(id int32 [1], confidence float32 [1]) of a draft, lazily.

    Args:
        attached: the model.
        picker: the target's picker; the same noise at the same position couples drafts to the target.
        refined: [1, D] the input of the LM head.
        position: [1] int32, absolute position of the draft.
        history: [C] int32 tokens before the draft, or None without penalties.
        unembedding: the drafter's own LM head over the draft vocabulary; None for the model's head.
        vocabulary: the tokens to pick from with the model's head; None for the draft vocabulary.
    """
    row = None if history is None else history[None]
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


class Beams:
    """A tree of drafts that grows by a position at a time, lazily: by the likeliest continuations of its paths.

    Args:
        verified: the outcome of the pass. At most `verified.layout.width` drafts are kept for each position.

    Attributes:
        tokens: [P] int32, the newest token of every path; before the first position, the target's own pick.
        histories: [P, C] int32 tokens before the next position, or None without penalties.
    """

    def __init__(self, verified: Verified) -> None:
        self._most, self._before = verified.layout.width, verified.position
        self.tokens = verified.pick.reshape(1)
        self.histories = None if verified.history is None else self._with_newest(verified.history[None])
        self._paths = mx.ones((1,))  # [P] their chances
        self._ids: list[mx.array] = []
        self._chances: list[mx.array] = []
        self._parents: list[mx.array] = []

    def _with_newest(self, histories: mx.array) -> mx.array:
        return mx.concatenate([histories[:, 1:], self.tokens[:, None]], axis=1)

    def grow(
        self, picker: Picker, logits: mx.array, token_ids: mx.array | None, share: mx.array | None = None
    ) -> mx.array:
        """[P'] int32, which of the P paths each of the longer ones continues.

        Args:
            picker: the target's picker.
            logits: [P, V] of the next position, behind each path; [1, V] if they are the same behind all.
            token_ids: [V] int32 ids of the columns, or None if these are the ids.
            share: [] probability of all these tokens together, if others are possible.
        """
        count = self.tokens.shape[0]
        if self.histories is not None:  # penalties make them differ
            logits = mx.broadcast_to(logits, (count, logits.shape[-1]))
        positions = mx.broadcast_to(self._before + len(self._ids) + 1, (logits.shape[0],))
        given = picker.candidates(logits, positions, self.histories, token_ids, self._most)
        found, sure = (mx.broadcast_to(each, (count, each.shape[-1])) for each in given)  # [P, w]
        sure = sure if share is None else sure * share
        along = (self._paths[:, None] * sure).reshape(-1)  # [P * w]
        best = mx.argsort(-along)[: self._most]
        parents = (best // found.shape[1]).astype(mx.int32)
        earlier = sum(ids.shape[0] for ids in self._ids[:-1])
        self._parents.append(parents + earlier if self._ids else mx.full(parents.shape, ROOT, dtype=mx.int32))
        self._paths, self.tokens = along[best], found.reshape(-1)[best]
        self._ids.append(self.tokens)
        self._chances.append(sure.reshape(-1)[best])
        if self.histories is not None:
            self.histories = self._with_newest(self.histories[parents])
        return parents

    def drafts(self) -> LazyDrafts:
        """The tree."""
        return LazyDrafts(*map(mx.concatenate, (self._ids, self._chances, self._parents)))
