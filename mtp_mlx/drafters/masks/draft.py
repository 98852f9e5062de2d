"""Drafts from mask slots: slot latents, one after another through the sampler head (arXiv 2507.11851, 2.3).

Everything stays lazy: which slot group counts depends on how many drafts were accepted, and that number is
an array here, so a step needs one host read, not two.
"""

from __future__ import annotations

import mlx.core as mx
import numpy as np

from mtp_mlx.decode.draft_pick import pick_draft
from mtp_mlx.decode.pick import Picker
from mtp_mlx.model.attach import AttachedModel
from mtp_mlx.model.block import BlockShape
from mtp_mlx.model.head import Vocabulary


class MaskSlotDrafter:
    """Drafts with a mask-token adapter.

    Args:
        attached: a model with an adapter.
        picker: the target's picker; drafts use the same noise, which couples them to the target.
        vocabulary: what to pick drafts from; None for the draft vocabulary. Confidences are probabilities within it.
    """

    lead = 0  # slots at the start of a group that draft nothing
    other_sampling = ""  # what they were not trained for: they learnt no particular sampling

    def __init__(self, attached: AttachedModel, picker: Picker, vocabulary: Vocabulary | None = None) -> None:
        if attached.adapter is None:
            raise ValueError("mask slots need an adapter")
        self._attached, self._picker = attached, picker
        self._vocabulary = vocabulary or attached.draft_vocabulary
        self._sampler = attached.adapter.sampler
        self._together = attached.adapter.config.sampler_width == 0  # no draft waits for the one before it
        self.max_drafts = attached.adapter.config.slots

    def propose(
        self,
        hidden: mx.array,
        shape: BlockShape,
        accepted: mx.array,
        pick: mx.array,
        position: mx.array,
        history: mx.array | None,
    ) -> tuple[mx.array, mx.array]:
        """Drafts for the positions after the target's own pick.

        Args:
            hidden: [R, D] latents of the block.
            shape: the block's rows.
            accepted: int32 scalar a, which slot group counts.
            pick: int32 scalar, the target's pick after the accepted drafts.
            position: int32 scalar, absolute position of `pick`.
            history: [C] int32 tokens before `pick`, or None without penalties.

        Returns:
            ids [k] int32 and confidences [k] float32, k the largest group; entries beyond the size of group a
            are meaningless.
        """
        starts = np.array(shape.group_start)
        count = int(max(np.diff([*starts, shape.rows])))
        if count == 0:
            return mx.zeros((0,), dtype=mx.int32), mx.zeros((0,))
        rows = mx.minimum(mx.array(starts.astype(np.int32))[accepted] + mx.arange(count), shape.rows - 1)
        latents = hidden[rows]  # [k, D]
        if self._together and history is None:
            return self._pick_together(latents, position)
        ids, confidences = [], []
        token = pick.reshape(1)
        for slot in range(count):
            if history is not None:
                history = mx.concatenate([history[1:], token])
            refined = self._sampler(self._attached.embed(token), latents[slot][None])
            token, confidence = pick_draft(
                self._attached,
                self._picker,
                refined,
                (position + slot + 1).reshape(1),
                history,
                vocabulary=self._vocabulary,
            )
            ids.append(token)
            confidences.append(confidence)
        return mx.concatenate(ids), mx.concatenate(confidences)

    def _pick_together(self, latents: mx.array, position: mx.array) -> tuple[mx.array, mx.array]:
        """Ids and confidences of slot latents [k, D] whose first stands for the token at `position` + 1."""
        positions = position + 1 + mx.arange(latents.shape[0])
        logits = self._vocabulary.head(latents[None])[0]  # [k, C]
        return self._picker.pick_with_confidence(logits, positions, None, self._vocabulary.ids)
