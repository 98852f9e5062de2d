"""What drafts for a model, as the model's forward passes see it.

An adapter of slots, heads behind the trunk, another model: each is a `Speculator`, one module apart from the base
model's own tree. `attach` puts it on a model, which then has it in its field `speculator`. How it drafts is a matter
of decoding: `mtp_mlx.decode.drafter`.
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
        places_slots: its drafts come from slot rows of the block; otherwise they are made behind the pass.
    """

    places_slots: ClassVar[bool] = False

    @property
    def drafts(self) -> int:
        """Tokens drafted in a step unless another number is asked for."""
        raise NotImplementedError

    @property
    def draft_ids(self) -> mx.array | None:
        """[N] int32 ids that may be drafted, or None for the whole vocabulary."""
        return None

    @property
    def first_hidden(self) -> str:
        """The trunk's state that it takes: "post-norm", "pre-norm" or "before-last-layer" (`model.tap`)."""
        return "post-norm"

    @property
    def lead(self) -> int:
        """Rows at the start of every slot group that draft nothing."""
        return 0

    def gated_layers(self) -> dict[str, LowRank]:
        """{path of a linear layer below the trunk: the update that acts on its slot rows}."""
        return {}

    def embedding_layer(self, base: nn.Module, vocab_size: int, rows: RowContext) -> nn.Module:
        """The model's embedding `base` with slot ids (from `vocab_size` on) answered by this speculator."""
        return base
