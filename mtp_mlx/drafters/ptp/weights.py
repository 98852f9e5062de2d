"""The weights that Parallel Token Prediction adds to a base model: gated LoRA and an embedding of uniforms.

arXiv 2512.21323. A token is picked by the inverse CDF with one uniform per position, so the text before and the
uniform of a position determine its token. Slots are given uniforms, where mask tokens are given nothing:

    variant  the slot that predicts position n   has position   sees the uniforms of   its draft
    "o"      is given the uniform of n           n - 1          .., n - 1, n           the likeliest token
    "c"      is given the uniform of n - 1       n - 1          .., n - 1              by the inverse CDF

In a block, the target's own pick takes the position after the accepted drafts. In variant "c" the first slot is given
that pick's uniform and predicts the token after it. In variant "o" a group starts with one more slot, which is given
the pick's uniform and whose own prediction, the pick, is not used (`lead`).
"""

from __future__ import annotations

from typing import cast

import mlx.core as mx
import mlx.nn as nn

from mtp_mlx.decode.pick import Picker, SamplingConfig
from mtp_mlx.drafters.ptp.config import PTPConfig
from mtp_mlx.drafters.ptp.draft import PTPSlotDrafter
from mtp_mlx.drafters.ptp.uniform_embedding import Start, UniformSlotEmbedding, uniform_embedding
from mtp_mlx.drafters.slots.adapter import SlotAdapter, adapted_sizes, embedding_sample
from mtp_mlx.errors import MTPError
from mtp_mlx.model.attach import AttachedModel
from mtp_mlx.model.rows import RowContext


class PTPAdapter(SlotAdapter):
    """Trained weights of a PTP adapter.

    Args:
        config: shape of the adapter.
        linear_sizes: {path of a linear layer below the trunk: (D_in, D_out)}.
        start: initial values of the embedding of uniforms.
        draft_ids: [N] ascending int32 ids that may be drafted, or None for all.
    """

    title = "Parallel Token Prediction"
    noise = "inverse-cdf"

    def __init__(
        self,
        config: PTPConfig,
        linear_sizes: dict[str, tuple[int, int]],
        start: Start,
        draft_ids: mx.array | None = None,
    ) -> None:
        super().__init__(config, linear_sizes, draft_ids)
        self.u_embed = uniform_embedding(config.embedding, start, config.knots)

    @property
    def slot_module(self) -> nn.Module:
        """See `SlotAdapter`."""
        return self.u_embed

    def embedding_layer(self, base: nn.Module, vocab_size: int, rows: RowContext) -> nn.Module:
        """See `Speculator`."""
        return UniformSlotEmbedding(base, self.u_embed, vocab_size, rows)

    @property
    def lead(self) -> int:
        """See `Speculator`."""
        return self.config.lead

    def check_sampling(self, sampling: SamplingConfig) -> None:
        """See `DraftSource`: slots are given the uniforms of the inverse CDF, which other sampling methods lack."""
        if sampling.noise == "gumbel" and sampling.temperature > 0:
            raise MTPError(
                "this adapter's slots need the uniforms of inverse-CDF sampling, which noise 'gumbel' does not use: "
                "leave `noise` out, or use `layout` plain"
            )

    def why_not_unverified(self) -> str:
        """See `DraftSource`."""
        return "is for mask tokens, and this adapter is for Parallel Token Prediction"

    def open(
        self, attached: AttachedModel, picker: Picker, drafts: int, start: int, *, verified: bool = True
    ) -> PTPSlotDrafter:
        """See `DraftSource`."""
        return PTPSlotDrafter(attached, picker, self.config)


def new_ptp_adapter(model: nn.Module, config: PTPConfig, draft_ids: mx.array | None = None) -> PTPAdapter:
    """An untrained adapter of `config`'s shape for `model`; uniform embeddings start around the mean token embedding.

    Raises:
        MTPError: if the model lacks a seam, or `target_modules` names a layer that it does not have.
    """
    sizes, _ = adapted_sizes(model, config.target_modules, config.rank)
    sample = embedding_sample(model)
    start = Start(mx.mean(sample, axis=0), cast(float, mx.mean(mx.std(sample, axis=0)).item()))
    return PTPAdapter(config, sizes, start, draft_ids)
