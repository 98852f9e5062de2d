"""The interface between a drafter's weights and the forward passes of its base model.

An adapter with slots, heads on the trunk, another model: each is a `Speculator`, a module outside the base model's
own tree. `attach` puts it on a model as its field `speculator`. How it drafts is defined in `mtp_mlx.decode.drafter`.
"""

from __future__ import annotations

from typing import ClassVar

import mlx.core as mx
import mlx.nn as nn

from mtp_mlx.model.gated_lora import LowRank
from mtp_mlx.model.rows import RowContext


class Speculator(nn.Module):
    """Weights that draft for a base model.

    Attributes:
        places_slots: whether drafts come from slot rows of the block; otherwise they are made after the pass.
        reads_caches: whether it reads the model's own keys and values, of one text in one process.
    """

    places_slots: ClassVar[bool] = False
    reads_caches: ClassVar[bool] = False

    @property
    def drafts(self) -> int:
        """Default number of drafts per step."""
        raise NotImplementedError

    @property
    def draft_ids(self) -> mx.array | None:
        """[N] int32 ids that may be drafted, or None for the whole vocabulary."""
        return None

    @property
    def first_hidden(self) -> str:
        """Where in the trunk it reads hidden states: "post-norm", "pre-norm" or "before-last-layer" (`model.tap`)."""
        return "post-norm"

    @property
    def tapped_layers(self) -> tuple[int, ...]:
        """Decoder layers, counted from 1, whose outputs it reads too; in `head_input` they precede `first_hidden`."""
        return ()

    @property
    def lead(self) -> int:
        """Rows at the start of every slot group that draft nothing."""
        return 0

    def gated_layers(self) -> dict[str, LowRank]:
        """{path of a linear layer below the trunk: its low-rank update on slot rows}."""
        return {}

    def embedding_layer(self, base: nn.Module, vocab_size: int, rows: RowContext) -> nn.Module:
        """The embedding `base`, extended by this speculator's embeddings for slot ids (from `vocab_size` on)."""
        return base
