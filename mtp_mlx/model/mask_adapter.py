"""The weights a mask-token adapter adds to a base model: gated LoRA, slot embeddings, sampler head.

`MaskAdapter` is one module, apart from the base model's tree: it is what is trained, saved and attached.
"""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn

from mtp_mlx.errors import MTPError
from mtp_mlx.model.rows import RowContext
from mtp_mlx.model.sampler_head import SamplerHead
from mtp_mlx.model.slot_adapter import SlotAdapter
from mtp_mlx.model.slots import SlotAwareEmbedding, SlotEmbeddings


@dataclass(frozen=True)
class MaskAdapterConfig:
    """Shape of a mask-token adapter (the paper's names: k masks, LoRA rank r)."""

    slots: int = 4
    rank: int = 16
    alpha: float = 32.0
    target_modules: tuple[str, ...] = ()  # last part of the layer's name; empty = every linear of a layer
    sampler_width: int = 1024  # hidden size of the sampler head
    draft_vocab_size: int = 0  # 0 = drafts come from the whole vocabulary

    def __post_init__(self) -> None:
        for name in ("slots", "rank", "sampler_width"):
            if getattr(self, name) < 1:
                raise MTPError(f"adapter config: {name} must be at least 1, got {getattr(self, name)}")


class MaskAdapter(SlotAdapter):
    """Trained weights of the mask-token method.

    Args:
        config: shape of the adapter.
        linear_sizes: {path of a linear layer below the trunk: (D_in, D_out)}.
        hidden_size: D.
        draft_ids: [N] int32 ids that may be drafted, or None for all.
        initial_slot: [D] start of every slot embedding, or None for small noise.
    """

    def __init__(
        self,
        config: MaskAdapterConfig,
        linear_sizes: dict[str, tuple[int, int]],
        hidden_size: int,
        draft_ids: mx.array | None = None,
        initial_slot: mx.array | None = None,
    ) -> None:
        super().__init__(config, linear_sizes, draft_ids)
        self.slot_embeddings = SlotEmbeddings(config.slots, hidden_size, initial_slot)
        self.sampler = SamplerHead(hidden_size, config.sampler_width)

    @property
    def slot_module(self) -> nn.Module:
        """See `SlotAdapter`."""
        return self.slot_embeddings

    def embedding_layer(self, base: nn.Module, vocab_size: int, rows: RowContext) -> nn.Module:
        """See `SlotAdapter`."""
        return SlotAwareEmbedding(base, self.slot_embeddings, vocab_size)
