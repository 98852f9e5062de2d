"""The weights that Parallel Token Prediction adds to a base model: gated LoRA and an embedding of uniforms.

arXiv 2512.21323. A token is picked by the inverse CDF with one uniform per position, so given the text before, the
uniform of a position carries all there is to know of its token. Slots carry uniforms where mask tokens carry nothing:

    variant  a slot that predicts the token at position n   stands at   sees the uniforms of   its draft
    "o"      carries the uniform of n                       n - 1       .., n - 1, n           the likeliest column
    "c"      carries the uniform of n - 1                   n - 1       .., n - 1              by the inverse CDF

In a block the target's own pick fills the position after the accepted drafts. In variant "c" the first slot carries
that pick's uniform and predicts what follows it. In variant "o" a group starts with one more slot that carries the
pick's uniform and whose own prediction, the pick, is not used (`lead`).
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
        start: where the embedding of uniforms starts.
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
        """See `DraftSource`: slots carry the uniforms of picks by the inverse CDF, which other noise does not use."""
        if sampling.noise == "gumbel" and sampling.temperature > 0:
            raise MTPError(
                "this adapter's slots carry the uniforms of picks by the inverse CDF, which noise 'gumbel' does not "
                "use: leave the noise out, or decode plainly"
            )

    def why_not_unverified(self) -> str:
        """See `DraftSource`."""
        return "is for mask tokens, and this adapter's slots are of Parallel Token Prediction"

    def open(
        self, attached: AttachedModel, picker: Picker, drafts: int, start: int, *, verified: bool = True
    ) -> PTPSlotDrafter:
        """See `DraftSource`."""
        return PTPSlotDrafter(attached, picker, self.config)


def new_ptp_adapter(model: nn.Module, config: PTPConfig, draft_ids: mx.array | None = None) -> PTPAdapter:
    """As `new_adapter`, for Parallel Token Prediction."""
    sizes, _ = adapted_sizes(model, config.target_modules, config.rank)
    sample = embedding_sample(model)
    start = Start(mx.mean(sample, axis=0), cast(float, mx.mean(mx.std(sample, axis=0)).item()))
    return PTPAdapter(config, sizes, start, draft_ids)
