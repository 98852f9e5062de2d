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
from mtp_mlx.model.sampler_head import SamplerHead
from mtp_mlx.model.slots import SlotEmbeddings
from mtp_mlx.model.tensor_fit import check_fit


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
        self.slot_embeddings = SlotEmbeddings(config.slots, hidden_size, initial_slot)
        self.sampler = SamplerHead(hidden_size, config.sampler_width)
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
