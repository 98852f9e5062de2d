"""Drafts from slots that are given uniforms: Parallel Token Prediction (arXiv 2512.21323), both variants.

Every slot is given the uniform of (seed, an absolute position), which does not change between steps. A draft is
therefore what the target would pick with that uniform, as far as the student knows the target's distribution. Slots
know of each other through attention, so one pass gives all drafts, without a head that runs sequentially (except with
penalties, which depend on the history). At temperature 0 uniforms have no effect; slots are then given none and are
mask tokens. In a tree a slot's candidates are the same behind all drafts before it, except for penalties.
"""

from __future__ import annotations

import dataclasses

import mlx.core as mx
import numpy as np

from mtp_mlx.decode.draft_pick import Beams
from mtp_mlx.decode.drafter import Drafter, LazyDrafts, Verified
from mtp_mlx.decode.pick import Picker
from mtp_mlx.drafters.ptp.config import PTPConfig
from mtp_mlx.drafters.ptp.uniform_embedding import NOTHING
from mtp_mlx.metal_kernels.position_noise import position_uniforms
from mtp_mlx.model.attach import AttachedModel
from mtp_mlx.model.block import BlockShape


class PTPSlotDrafter(Drafter):
    """Drafts with a PTP adapter.

    Args:
        attached: a model with such an adapter.
        picker: the target's picker, which samples by the inverse CDF.
        config: the adapter's config.
    """

    def __init__(self, attached: AttachedModel, picker: Picker, config: PTPConfig) -> None:
        self._attached, self._picker, self._config = attached, picker, config
        self.note = self._other_sampling()

    def _other_sampling(self) -> str:
        """A sentence on how the sampling differs from the one that the adapter was trained for; "" if it does not.

        Greedy decoding does not count, since slots are then given no uniforms.
        """
        if self._picker.config.temperature == 0:
            return ""
        different = [
            f"{name} {value:g}"
            for name, value in dataclasses.asdict(self._config.teacher).items()
            if getattr(self._picker.config, name) != value
        ]
        if not different:
            return ""
        return (
            f"not the sampling this adapter was trained for ({', '.join(different)}): fewer drafts are right"
        )

    def uniforms(self, shape: BlockShape, start: int) -> mx.array:
        """See `Drafter`."""
        offsets = shape.offsets[shape.n_real :]
        if self._config.independent or self._picker.config.temperature == 0:
            return mx.full((len(offsets),), NOTHING)
        # With a lead slot, each slot is given the uniform of the token that it predicts.
        positions = mx.array(offsets + start + self._config.lead)
        return position_uniforms(self._picker.config.seed, positions)

    def propose(self, verified: Verified) -> LazyDrafts:
        """See `Drafter`."""
        shape = verified.shape
        starts = np.array(shape.group_start)
        count = int(max(np.diff([*starts, shape.rows]))) - shape.lead
        if count <= 0:
            return LazyDrafts.none()
        first = mx.array(starts.astype(np.int32))[verified.last] + shape.lead
        rows = mx.minimum(first + mx.arange(count), shape.rows - 1)
        logits = self._attached.draft_head(verified.hidden[rows])  # [k, C]
        picker, history = self._picker, verified.history
        if self._config.variant == "o":  # the uniform went into the slot: the likeliest token is the draft
            picker, history = Picker(), None
        if verified.layout.width > 1:
            beams = Beams(verified)
            for slot in range(count):
                beams.grow(picker, logits[slot][None], self._attached.draft_ids)
            return beams.drafts()
        positions = verified.position + 1 + mx.arange(count)
        if history is not None:
            return self._one_by_one(logits, positions, verified.pick.reshape(1), history)
        return LazyDrafts(*picker.pick_with_confidence(logits, positions, None, self._attached.draft_ids))

    def _one_by_one(
        self, logits: mx.array, positions: mx.array, token: mx.array, history: mx.array
    ) -> LazyDrafts:
        """Picks the drafts in order, with penalties that count the drafts before; history: [C] before `token`."""
        ids, confidences = [], []
        for slot in range(logits.shape[0]):
            history = mx.concatenate([history[1:], token])
            token, confidence = self._picker.pick_with_confidence(
                logits[slot][None], positions[slot][None], history[None], self._attached.draft_ids
            )
            ids.append(token)
            confidences.append(confidence)
        return LazyDrafts(mx.concatenate(ids), mx.concatenate(confidences))
