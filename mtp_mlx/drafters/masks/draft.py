"""Drafts from mask slots: their hidden states go one by one through the sampler head (arXiv 2507.11851, section 2.3).

Everything is lazy: which slot group is used depends on the number of accepted drafts, which is still an array, so a
step needs one host read, not two.
"""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mtp_mlx.decode.draft_pick import Beams, pick_draft
from mtp_mlx.decode.drafter import Drafter, LazyDrafts, Verified
from mtp_mlx.decode.pick import Picker
from mtp_mlx.drafters.masks.shortlist import Shortlist, layer_of_shortlists, shortlist
from mtp_mlx.model.attach import AttachedModel
from mtp_mlx.model.head import Vocabulary


class MaskSlotDrafter(Drafter):
    """Drafts with a mask-token adapter.

    Args:
        attached: a model with such an adapter.
        picker: the target's picker; drafts use the same noise, which couples them to the target.
        sampler: the adapter's sampler head.
        vocabulary: the tokens to pick from; confidences are probabilities among these.
        together: whether all drafts are picked at once, because there is no sampler head.
        listed: whether the sampler head may score a shortlist of tokens instead of the whole vocabulary.
    """

    def __init__(
        self,
        attached: AttachedModel,
        picker: Picker,
        sampler: nn.Module,
        vocabulary: Vocabulary,
        together: bool = False,
        listed: bool = False,
    ) -> None:
        self._attached, self._picker, self._sampler = attached, picker, sampler
        self._vocabulary, self._together = vocabulary, together
        layer = layer_of_shortlists(attached.whole_vocabulary, vocabulary, picker) if listed else None
        self._layer = None if together else layer

    def propose(self, verified: Verified) -> LazyDrafts:
        """See `Drafter`."""
        shape, position, history = verified.shape, verified.position, verified.history
        starts = np.array(shape.group_start)
        count = int(max(np.diff([*starts, shape.rows])))
        if count == 0:
            return LazyDrafts.none()
        rows = mx.minimum(mx.array(starts.astype(np.int32))[verified.last] + mx.arange(count), shape.rows - 1)
        latents = verified.hidden[rows]  # [k, D]
        if verified.layout.width > 1:
            return self._grow(latents, verified)
        if self._together and history is None:
            return self._pick_together(latents, position)
        listed = self._shortlist(latents, verified) if self._attached.kernels is None else None
        ids, confidences = [], []
        token = verified.pick.reshape(1)
        for slot in range(count):
            if history is not None:
                history = mx.concatenate([history[1:], token])
            refined = self._sampler(self._attached.embed(token), latents[slot][None])
            token, confidence = self._pick(listed, slot, refined, (position + slot + 1).reshape(1), history)
            ids.append(token)
            confidences.append(confidence)
        return LazyDrafts(mx.concatenate(ids), mx.concatenate(confidences))

    def _shortlist(self, latents: mx.array, verified: Verified) -> Shortlist | None:
        """The tokens that the sampler head scores, of slots with hidden states [k, D]; None for all."""
        if self._layer is None:
            return None
        positions = verified.position + 1 + mx.arange(latents.shape[0])
        return shortlist(latents, positions, verified.history, self._layer, self._vocabulary, self._picker)

    def _pick(
        self,
        listed: Shortlist | None,
        slot: int,
        refined: mx.array,
        position: mx.array,
        history: mx.array | None,
    ) -> tuple[mx.array, mx.array]:
        """(id int32 [1], confidence float32 [1]) of a slot's draft, from the input [1, D] of the LM head."""
        if listed is None:
            vocabulary = self._vocabulary
            return pick_draft(self._attached, self._picker, refined, position, history, vocabulary=vocabulary)
        row = None if history is None else history[None]
        logits, ids = listed.logits(slot, refined), listed.ids[slot]
        token, confidence = self._picker.pick_with_confidence(logits, position, row, ids)
        return token, confidence * listed.shares[slot]

    def _pick_together(self, latents: mx.array, position: mx.array) -> LazyDrafts:
        """Drafts from slot hidden states [k, D], of which the first predicts the token at `position` + 1."""
        positions = position + 1 + mx.arange(latents.shape[0])
        logits = self._vocabulary.head(latents[None])[0]  # [k, C]
        return LazyDrafts(*self._picker.pick_with_confidence(logits, positions, None, self._vocabulary.ids))

    def _grow(self, latents: mx.array, verified: Verified) -> LazyDrafts:
        """A tree: at each position the `layout.width` likeliest continuations of those before, from latents [k, D].

        The slot's latent is the same for all; the sampler head refines it by the token before. Without such a head,
        every continuation has the same candidates.
        """
        listed, beams = self._shortlist(latents, verified), Beams(verified)
        for slot in range(latents.shape[0]):
            tokens = beams.tokens
            latent = mx.broadcast_to(latents[slot], (tokens.shape[0], latents.shape[1]))
            refined = self._sampler(self._attached.embed(tokens), latent)  # [P, D]
            if listed is None:
                beams.grow(self._picker, self._vocabulary.head(refined[None])[0], self._vocabulary.ids)
            else:
                logits, ids = listed.logits(slot, refined), listed.ids[slot]
                beams.grow(self._picker, logits, ids, listed.shares[slot])
        return beams.drafts()
