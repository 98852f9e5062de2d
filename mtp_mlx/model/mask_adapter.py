"""The weights a mask-token adapter adds to a base model: gated LoRA, slot embeddings, sampler head.

`MaskAdapter` is one module, apart from the base model's tree: it is what is trained, saved and attached.
"""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from mtp_mlx.errors import MTPError
from mtp_mlx.model.gated_lora import LowRank
from mtp_mlx.model.sampler_head import NoSamplerHead, SamplerHead
from mtp_mlx.model.slots import SharedMask, SlotEmbeddings
from mtp_mlx.model.tensor_fit import check_fit


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


class MaskAdapter(nn.Module):
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
        super().__init__()
        self.low_rank = {
            path: LowRank(*sizes, rank=config.rank, alpha=config.alpha)
            for path, sizes in linear_sizes.items()
        }
        masks = SharedMask if config.shared_mask else SlotEmbeddings
        self.slot_embeddings = masks(config.slots, hidden_size, initial_slot)
        width = config.sampler_width
        self.sampler = SamplerHead(hidden_size, width) if width else NoSamplerHead()
        self._config = config
        self._draft_ids = draft_ids

    @property
    def config(self) -> MaskAdapterConfig:
        """Shape of the adapter."""
        return self._config

    @property
    def draft_ids(self) -> mx.array | None:
        """[N] int32 ids that may be drafted, or None for the whole vocabulary."""
        return self._draft_ids

    def tensors(self) -> dict[str, mx.array]:
        """Every tensor by its dotted name, the draft vocabulary included: what is written to disk."""
        tensors = dict(tree_flatten(self.parameters()))
        if self._draft_ids is not None:
            tensors["draft_ids"] = self._draft_ids
        return tensors

    def load_tensors(self, tensors: dict[str, mx.array]) -> None:
        """Sets every weight from `tensors` (as written by `tensors`), in float32.

        Raises:
            MTPError: names missing, unexpected or of another shape; all of them in one message.
        """
        tensors = {name: value for name, value in tensors.items() if name != "draft_ids"}
        own = dict(tree_flatten(self.parameters()))
        check_fit(own, tensors)
        for name, value in tensors.items():
            self._owner_of(name)[name.rsplit(".", 1)[1]] = value.astype(mx.float32)

    def _owner_of(self, name: str) -> nn.Module:
        """The sub-module that holds tensor `name`."""
        first, rest = name.split(".", 1)
        if first == "low_rank":
            return self.low_rank[rest.rsplit(".", 1)[0]]
        module = self[first]
        for part in rest.split(".")[:-1]:
            module = module[part]
        return module
