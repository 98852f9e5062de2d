"""The weights a mask-token adapter adds to a base model: gated LoRA, slot embeddings, sampler head.

`MaskAdapter` is one module, apart from the base model's tree: it is what is trained, saved and attached.
"""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn

from mtp_mlx.errors import MTPError
from mtp_mlx.model.rows import RowContext
from mtp_mlx.model.sampler_head import NoSamplerHead, SamplerHead
from mtp_mlx.model.slot_adapter import SlotAdapter
from mtp_mlx.model.slots import SharedMask, SlotAwareEmbedding, SlotEmbeddings


@dataclass(frozen=True)
class MaskAdapterConfig:
    """Shape of a mask-token adapter (the paper's names: k masks, LoRA rank r).

    `shared_mask` with `sampler_width` 0 is the form of arXiv 2602.06019: one mask token in every slot, each slot
    predicted by itself. With `rank` 0 as well there is nothing but the mask: the model itself was fine-tuned.
    """

    slots: int = 4
    rank: int = 16  # 0 = no LoRA, with a shared mask only
    alpha: float = 32.0
    target_modules: tuple[str, ...] = ()  # last part of the layer's name; empty = every linear of a layer
    sampler_width: int = 1024  # hidden size of the sampler head; 0 = none, with a shared mask only
    draft_vocab_size: int = 0  # 0 = drafts come from the whole vocabulary
    shared_mask: bool = False  # all slots are the same mask token

    def __post_init__(self) -> None:
        least_size = 0 if self.shared_mask else 1
        for name, least in (("slots", 1), ("rank", least_size), ("sampler_width", least_size)):
            if getattr(self, name) < least:
                raise MTPError(f"adapter config: {name} must be at least {least}, got {getattr(self, name)}")


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
        masks = SharedMask if config.shared_mask else SlotEmbeddings
        self.slot_embeddings = masks(config.slots, hidden_size, initial_slot)
        width = config.sampler_width
        self.sampler = SamplerHead(hidden_size, width) if width else NoSamplerHead()

    @property
    def slot_module(self) -> nn.Module:
        """See `SlotAdapter`."""
        return self.slot_embeddings

    def embedding_layer(self, base: nn.Module, vocab_size: int, rows: RowContext) -> nn.Module:
        """See `SlotAdapter`."""
        return SlotAwareEmbedding(base, self.slot_embeddings, vocab_size)
