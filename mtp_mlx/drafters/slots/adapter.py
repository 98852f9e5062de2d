"""What adapters that draft from slots have in common: gated LoRA, a draft vocabulary, tensors by name.

A `SlotAdapter` is one module outside the base model's tree, which is trained, saved and attached. Each method adds
its own slot embeddings and heads.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from mtp_mlx.decode.drafter import DraftSource
from mtp_mlx.errors import MTPError
from mtp_mlx.model.attach import AttachedModel
from mtp_mlx.model.gated_lora import LowRank, linear_sizes
from mtp_mlx.model.seams import (
    check_slot_seams,
    embedding_shape,
    find_seams,
)
from mtp_mlx.model.tensor_fit import check_fit


class SlotAdapter(DraftSource):
    """Base of `MaskAdapter` and `PTPAdapter`.

    Args:
        config: shape of the adapter; has at least `slots`, `rank` and `alpha`.
        linear_sizes: {path of a linear layer below the trunk: (D_in, D_out)}.
        draft_ids: [N] int32 ids that may be drafted, or None for all.
    """

    name = "slots"
    places_slots = True

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
        """The shape of the adapter."""
        return self._config

    @property
    def drafts(self) -> int:
        """See `Speculator`: one draft per slot."""
        return int(self._config.slots)

    def check_drafts(self, drafts: int | None) -> None:
        """See `DraftSource`."""
        if drafts is not None and not 1 <= drafts <= self.drafts:
            raise MTPError(
                f"drafts per step must be 1 to {self.drafts}, the slots this adapter was trained with; got {drafts}"
            )

    def cost_key(self, columns: int) -> str:
        """See `DraftSource`."""
        return str(self._config)

    @property
    def draft_ids(self) -> mx.array | None:
        """See `Speculator`."""
        return self._draft_ids

    @property
    def slot_module(self) -> nn.Module:
        """The module of the slot embeddings, which is part of an attached model."""
        raise NotImplementedError

    def gated_layers(self) -> dict[str, LowRank]:
        """See `Speculator`."""
        return self.low_rank

    def tensors(self) -> dict[str, mx.array]:
        """Every tensor by its dotted name, including the draft vocabulary, as written to disk."""
        tensors = dict(tree_flatten(self.parameters()))
        if self._draft_ids is not None:
            tensors["draft_ids"] = self._draft_ids
        return tensors

    def load_tensors(self, tensors: dict[str, mx.array]) -> None:
        """Sets every weight from `tensors` (as written by `tensors`), in float32.

        Raises:
            MTPError: if tensors are missing, unexpected or of another shape (lists them).
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


def adapter_of(attached: AttachedModel) -> SlotAdapter:
    """The adapter of a model whose drafter uses slots."""
    adapter = attached.speculator
    assert isinstance(adapter, SlotAdapter)
    return adapter


def adapted_sizes(
    model: nn.Module, target_modules: tuple[str, ...], rank: int
) -> tuple[dict[str, tuple[int, int]], int]:
    """({path of a layer that gets LoRA: (D_in, D_out)}, D) of a bare model.

    Raises:
        MTPError: if the model lacks a seam, or `target_modules` names a layer that it does not have.
    """
    seams = find_seams(model)
    check_slot_seams(seams, model)
    linears = seams.linears if rank else {}
    if target_modules:
        known = {path.rsplit(".", 1)[-1] for path in linears}
        unknown = [name for name in target_modules if name not in known]
        if unknown:
            raise MTPError(
                f"`target_modules` {unknown} are not linear layers of this model; it has {sorted(known)}"
            )
        linears = {path: m for path, m in linears.items() if path.rsplit(".", 1)[-1] in target_modules}
    sizes = {path: linear_sizes(layer) for path, layer in linears.items()}
    return sizes, embedding_shape(seams.embedding)[1]


def embedding_sample(model: nn.Module) -> mx.array:
    """[about 1024, D] float32, evenly spaced rows of the embedding table."""
    embedding = find_seams(model).embedding
    vocab_size, _ = embedding_shape(embedding)
    return embedding(mx.arange(0, vocab_size, max(1, vocab_size // 1024))).astype(mx.float32)
