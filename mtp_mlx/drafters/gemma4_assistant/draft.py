"""Drafts with an assistant: a chain after every pass, before the step's one host read.

The assistant has no cache, so there is nothing to fill, to catch up with or to roll back: a step reads the keys and
values that the target holds anyway. When it drafts, the target's caches still hold the rows of rejected drafts; which
of them are committed is known to the graph, though not to the host yet, and hidden by the mask. A prefix that came in
a prompt cache is read as any other.

The target's own token has no row in the caches yet. The assistant gets it as an embedding, beside the target's state
of the row before. It looks back from the position of that row, or of the token (`AssistantConfig.position`), also for
the drafts that follow. transformers also shows it the row behind, where a rejected draft left one; mlx-vlm does not.
"""

from __future__ import annotations

import mlx.core as mx

from mtp_mlx.decode.drafter import Drafter, LazyDrafts, Verified
from mtp_mlx.decode.pick import Picker
from mtp_mlx.drafters.gemma4_assistant.config import SLIDING, AssistantConfig
from mtp_mlx.drafters.gemma4_assistant.target import ReadTarget
from mtp_mlx.drafters.gemma4_assistant.weights import Assistant, SeenRows
from mtp_mlx.model.attach import AttachedModel
from mtp_mlx.model.cached_rows import cached_rows


class AssistantDrafter(Drafter):
    """Drafts for one generation.

    Args:
        attached: the model to draft for.
        picker: the target's picker; drafts use the same noise, which couples them to the target.
        assistant: the weights.
        target: what they read of the model.
        config: how they are built and run.
    """

    def __init__(
        self,
        attached: AttachedModel,
        picker: Picker,
        assistant: Assistant,
        target: ReadTarget,
        config: AssistantConfig,
    ) -> None:
        self._attached, self._picker = attached, picker
        self._assistant, self._target = assistant, target
        self._window = config.window
        self._back = 1 if config.position == "state" else 0

    def propose(self, verified: Verified) -> LazyDrafts:
        """See `Drafter`: at each position the first candidate is followed, the others stand beside it."""
        layout, history = verified.layout, verified.history
        position = verified.position - self._back
        seen = {kind: self._seen(kind, verified, position) for kind in self._target.layers}
        state = verified.head_input[:, verified.accepted].reshape(1, 1, -1)
        token, ids, confidences = verified.pick.reshape(1), [], []
        for depth in range(1, layout.chain + 1):
            embedding = self._attached.embed(token[None]) * self._target.scale
            refined, state = self._assistant(embedding, state, seen, position)
            logits, columns = self._assistant.logits(refined)
            if history is not None:
                history = mx.concatenate([history[1:], token])
            before = None if history is None else history[None]
            at = (logits, (verified.position + depth).reshape(1), before, columns)
            if layout.width > 1:
                found, sure = (one[0] for one in self._picker.candidates(*at, layout.width))
            else:
                found, sure = self._picker.pick_with_confidence(*at)
            ids.append(found)
            confidences.append(sure)
            token = found[:1]
        return LazyDrafts.joined(ids, confidences)

    def _seen(self, kind: str, verified: Verified, position: mx.array) -> SeenRows:
        """The rows of the target's cache that layers of this kind see from a position."""
        newest, sliding = verified.hidden.shape[0], kind == SLIDING
        most = self._window + newest if sliding else None
        held = cached_rows(verified.caches[self._target.layers[kind]], most)
        before = held.keys.shape[2] - newest
        rows = mx.arange(newest)
        if verified.path is None:
            kept = rows <= verified.accepted
        else:
            kept = mx.any(
                verified.path[:, None] == rows, axis=0
            )  # behind the last accepted row it is repeated
        mask = mx.concatenate([mx.ones((before,), dtype=mx.bool_), kept])
        if sliding:
            first = held.start + before  # position of the pending token
            own = mx.array(verified.shape.offsets) + first
            places = mx.concatenate([mx.arange(held.start, first, dtype=own.dtype), own])
            mask = mask & (places > position - self._window)
        return SeenRows(held.keys, held.values, mask)
