"""A draft model as a `DraftSource`: a bare mlx-lm model next to the target, with its own cache per generation."""

from __future__ import annotations

from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from mtp_mlx.decode.drafter import DraftSource
from mtp_mlx.decode.pick import Picker
from mtp_mlx.drafters.draft_model.draft import DraftModelDrafter
from mtp_mlx.drafters.draft_model.options import DEFAULT_DRAFTS, MOST_DRAFTS
from mtp_mlx.model.attach import AttachedModel
from mtp_mlx.model.fingerprint import fingerprint_of


class DraftModel(DraftSource):
    """Another model that drafts.

    Its weights are not parameters of this module, so they keep their precision.

    Args:
        model: a bare mlx-lm model with the target's vocabulary.
        vocab_size: V, rows of the target's embedding; larger ids are padding and never drafted.
        drafts: drafts per step; None to plan them, at most `DEFAULT_DRAFTS`.
    """

    name = "draft-model"
    title = "a draft model"

    def __init__(self, model: nn.Module, vocab_size: int, drafts: int | None = None) -> None:
        super().__init__()
        self._model, self._vocab_size, self._drafts = model, vocab_size, drafts
        self._columns = cast(Any, model)(mx.array([[0]])).shape[-1]  # lazily: nothing is computed
        self._last: DraftModelDrafter | None = None

    @property
    def drafts(self) -> int:
        """See `Speculator`."""
        return self._drafts or DEFAULT_DRAFTS

    @property
    def fixed(self) -> bool:
        """See `DraftSource`: with a given number, every step makes that many drafts, as in mlx-lm."""
        return self._drafts is not None

    @property
    def most_drafts(self) -> int:
        """See `DraftSource`."""
        return MOST_DRAFTS

    def cost_key(self, columns: int) -> str:
        """See `DraftSource`."""
        weights: Any = tree_flatten(self._model.parameters())
        size = sum(tensor.nbytes for _, tensor in weights)
        fingerprint = fingerprint_of(self._model)[0] or getattr(self._model, "model_type", "?")
        return f"draft model {fingerprint}, {size} bytes, {self.drafts} drafts"

    def open(
        self, attached: AttachedModel, picker: Picker, drafts: int, start: int, *, verified: bool = True
    ) -> DraftModelDrafter:
        """See `DraftSource`."""
        drafter = DraftModelDrafter(
            self._model, picker, self._vocab_size, self._columns, attached.peers, self._last
        )
        self._last = drafter
        return drafter
