"""Tensor parallelism: a base model divided among processes by its own `shard`, and its adapter with it.

Every process has a part of each sharded layer: of its outputs ("all to sharded") or of its inputs ("sharded to all",
with a sum over the processes). A gated-LoRA update has the matching part of one of its factors. Legend: N processes,
r rank of the LoRA.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import mlx.core as mx
import mlx.nn as nn
from mlx.nn.layers.distributed import (
    AllToShardedLinear,
    QuantizedAllToShardedLinear,
    QuantizedShardedToAllLinear,
    ShardedToAllLinear,
)
from mlx_lm.models.cache import make_prompt_cache

from mtp_mlx.distributed import Peers
from mtp_mlx.errors import MTPError
from mtp_mlx.model.seams import find_seams, is_recurrent, module_at
from mtp_mlx.model.speculator import Speculator

OUTPUT_PARTS = (AllToShardedLinear, QuantizedAllToShardedLinear)
INPUT_PARTS = (ShardedToAllLinear, QuantizedShardedToAllLinear)


def shard(model: nn.Module, speculator: Speculator | None, peers: Peers) -> None:
    """Reduces `model` and the speculator's LoRA to this process's part; both are changed in place.

    Args:
        model: an mlx-lm model, not attached; if lazy, only this process's part stays in memory.
        speculator: made for the whole model, or None.
        peers: the processes that share the model.

    Raises:
        MTPError: if the model has no `shard`, has recurrent state or cannot be divided among that many processes, if
            its drafter reads its caches, or if its layers are divided in a way that the adapter's LoRA cannot follow.
    """
    name = str(getattr(model, "model_type", type(model).__name__))
    if not hasattr(model, "shard"):
        raise MTPError(
            f"model type '{name}' has no `shard` in mlx-lm, so several processes cannot share it: run it without "
            "mlx.launch"
        )
    if speculator is not None and speculator.reads_caches:
        raise MTPError(
            "this model's drafter reads the keys and values of all heads, which several processes divide: run it "
            "without mlx.launch, or leave `heads` out"
        )
    if is_recurrent(make_prompt_cache(model)):
        raise MTPError(
            f"model type '{name}' has recurrent state, which cannot be rolled back in several processes yet: run it "
            "without mlx.launch"
        )
    gated = {} if speculator is None else speculator.gated_layers()
    linears = find_seams(model).linears
    whole = {path: _Whole.of(cast(mx.array, linears[path].weight), peers) for path in gated}
    del linears  # a lazy layer that is kept here would stay in memory as a whole
    try:
        model.shard(peers.group)
    except ValueError as error:
        raise MTPError(
            f"model type '{name}' cannot be divided among {peers.size} processes ({error}): use another number"
        ) from error
    trunk = find_seams(model).trunk
    for path, before in whole.items():  # one after another, so that one whole layer is in memory at a time
        mx.eval(before.ends, module_at(trunk, path).parameters())
    mx.eval(model.parameters())
    for path, low_rank in gated.items():
        layer, before = module_at(trunk, path), whole[path]
        if isinstance(layer, OUTPUT_PARTS):
            _check_part(before, layer, path, 0, peers)
            low_rank.up = _part(low_rank.up, 1, peers)  # [r, D_out / N]
        elif isinstance(layer, INPUT_PARTS):
            _check_part(before, layer, path, 1, peers)
            low_rank.down = _part(low_rank.down, 0, peers)  # [D_in / N, r]
            low_rank.sum_over(peers)


@dataclass(frozen=True)
class _Whole:
    """What shows how a layer was divided, of its weight before.

    Attributes:
        shape: of the weight.
        ends: first and last row, and first and last column, of this process's part if it is a contiguous slice.
    """

    shape: tuple[int, ...]
    ends: tuple[mx.array, mx.array]

    @classmethod
    def of(cls, weight: mx.array, peers: Peers) -> _Whole:
        """Of a whole weight; lazy."""
        return cls(weight.shape, (_ends(weight, 0, peers), _ends(weight, 1, peers)))


def _ends(weight: mx.array, axis: int, peers: Peers) -> mx.array:
    length = weight.shape[axis] // peers.size
    first = peers.rank * length
    return mx.take(weight, mx.array([first, first + length - 1]), axis=axis)


def _part(tensor: mx.array, axis: int, peers: Peers) -> mx.array:
    return mx.contiguous(mx.split(tensor, peers.size, axis=axis)[peers.rank])


def _check_part(before: _Whole, layer: nn.Module, path: str, axis: int, peers: Peers) -> None:
    """Raises MTPError unless the layer's weight is a contiguous slice of the whole one along `axis`.

    Fused layers (queries, keys and values in one) are divided piece by piece, which their first and last row show.
    """
    length = before.shape[axis] // peers.size
    own = mx.take(cast(mx.array, layer.weight), mx.array([0, length - 1]), axis=axis)
    if before.shape[axis] != length * peers.size or not mx.array_equal(own, before.ends[axis]).item():
        raise MTPError(
            f"layer {path} is divided among processes in a way that this adapter's LoRA cannot follow: leave the "
            "adapter out (`adapter` none), or run without mlx.launch"
        )
