"""What adapters that draft from slots have in common: gated LoRA, a draft vocabulary, tensors by name.

A `SlotAdapter` is one module, apart from the base model's tree: it is what is trained, saved and attached. A method
adds its own slot embeddings and heads.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from mtp_mlx.model.gated_lora import LowRank
from mtp_mlx.model.rows import RowContext
from mtp_mlx.model.tensor_fit import check_fit


class SlotAdapter(nn.Module):
    """Base of `MaskAdapter` and `PTPAdapter`.

    Args:
        config: shape of the adapter; has at least `slots`, `rank` and `alpha`.
        linear_sizes: {path of a linear layer below the trunk: (D_in, D_out)}.
        draft_ids: [N] int32 ids that may be drafted, or None for all.
    """

    def __init__(
        self, config: Any, linear_sizes: dict[str, tuple[int, int]], draft_ids: mx.array | None = None
    ) -> None:
        super().__init__()
        self.low_rank = {
            path: LowRank(*sizes, rank=config.rank, alpha=config.alpha)
            for path, sizes in linear_sizes.items()
        }
        self._config = config
        self._draft_ids = draft_ids

    @property
    def config(self) -> Any:
        """Shape of the adapter."""
        return self._config

    @property
    def draft_ids(self) -> mx.array | None:
        """[N] int32 ids that may be drafted, or None for the whole vocabulary."""
        return self._draft_ids

    @property
    def slot_module(self) -> nn.Module:
        """The weights of slots' embeddings, which an attached model has inside."""
        raise NotImplementedError

    def embedding_layer(self, base: nn.Module, vocab_size: int, rows: RowContext) -> nn.Module:
        """The model's embedding `base` with slot ids (from `vocab_size` on) answered by this adapter."""
        raise NotImplementedError

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
