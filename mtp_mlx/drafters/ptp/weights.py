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

from dataclasses import dataclass
from typing import Literal, cast, get_args

import mlx.core as mx
import mlx.nn as nn

from mtp_mlx.drafters.ptp.uniform_embedding import (
    UNIFORM_EMBEDDINGS,
    Start,
    UniformEmbeddingName,
    UniformSlotEmbedding,
    uniform_embedding,
)
from mtp_mlx.errors import MTPError
from mtp_mlx.model.rows import RowContext
from mtp_mlx.model.slot_adapter import SlotAdapter, _embedding_sample, _sizes

Variant = Literal["o", "c"]


@dataclass(frozen=True)
class TeacherSampling:
    """The sampling whose CDF the uniforms of training belonged to; see `SamplingConfig`.

    Uniforms are conditional on it: decoding with another sampling writes the right text but accepts fewer drafts.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0


@dataclass(frozen=True)
class PTPConfig:
    """Shape of a PTP adapter.

    Attributes:
        variant: "o" (one-hot) or "c" (categorical), see the module.
        embedding: of uniforms, see `uniform_embedding`.
        knots: vectors of the embedding "linear-interpolation".
        slots: most drafts behind one position.
        rank, alpha: of the gated LoRA; the update is scaled by alpha / rank.
        target_modules: last part of a layer's name; empty = every linear of a layer.
        independent: slots carry nothing and know nothing of each other's tokens; the control of comparisons.
        draft_vocab_size: 0 = drafts come from the whole vocabulary.
        teacher: sampling of the text it was trained on.

    Raises MTPError for a value out of range.
    """

    variant: Variant = "o"
    embedding: UniformEmbeddingName = "bits"
    knots: int = 3
    slots: int = 8
    rank: int = 16
    alpha: float = 32.0
    target_modules: tuple[str, ...] = ()
    independent: bool = False
    draft_vocab_size: int = 0
    teacher: TeacherSampling = TeacherSampling()

    def __post_init__(self) -> None:
        for name in ("slots", "rank", "knots"):
            if getattr(self, name) < 1:
                raise MTPError(f"adapter config: {name} must be at least 1, got {getattr(self, name)}")
        for name, known in (("variant", get_args(Variant)), ("embedding", UNIFORM_EMBEDDINGS)):
            if getattr(self, name) not in known:
                raise MTPError(
                    f"adapter config: {name} is {getattr(self, name)!r}, but must be one of {', '.join(known)}"
                )

    @property
    def lead(self) -> int:
        """Slots at the start of a group that draft nothing."""
        return 1 if self.variant == "o" else 0


class PTPAdapter(SlotAdapter):
    """Trained weights of a PTP adapter.

    Args:
        config: shape of the adapter.
        linear_sizes: {path of a linear layer below the trunk: (D_in, D_out)}.
        start: where the embedding of uniforms starts.
        draft_ids: [N] ascending int32 ids that may be drafted, or None for all.
    """

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
        """See `SlotAdapter`."""
        return UniformSlotEmbedding(base, self.u_embed, vocab_size, rows)


def new_ptp_adapter(model: nn.Module, config: PTPConfig, draft_ids: mx.array | None = None) -> PTPAdapter:
    """As `new_adapter`, for Parallel Token Prediction."""
    sizes, _ = _sizes(model, config.target_modules, config.rank)
    sample = _embedding_sample(model)
    start = Start(mx.mean(sample, axis=0), cast(float, mx.mean(mx.std(sample, axis=0)).item()))
    return PTPAdapter(config, sizes, start, draft_ids)
