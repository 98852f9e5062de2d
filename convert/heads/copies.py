"""Copies of a model's embedding and LM head beside its heads, told by comparing rows with the model at hand.

Heads that come without their trunk may bring both along, as DeepSeek's and GLM's do: gigabytes that the model holds
already, perhaps quantised. Where the trunk lies beside them, `plan` compares the bytes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mtp_mlx.convert.heads.families import Found
from mtp_mlx.convert.heads.packed import is_packed, packing_of, parts_of
from mtp_mlx.convert.read.checkpoint import Checkpoint
from mtp_mlx.convert.read.lazy_tensor import LazyTensor, to_float32
from mtp_mlx.model.seams import find_seams

_ROWS = 64  # that are compared
_ALIKE = 0.95  # their mean cosine: four bits leave 0.99, and another training much less


def without_copies(checkpoint: Checkpoint, found: Found, model: nn.Module) -> tuple[Checkpoint, Found]:
    """The checkpoint and its heads without the tensors that the model at hand holds already."""
    gone: set[str] = set()
    for _, stored, part in found.copies:
        tensor = checkpoint.tensors.get(stored)
        if tensor is not None and _is_copy(stored, checkpoint.tensors, _layer(model, part)):
            gone |= parts_of(stored, checkpoint.tensors)
    tensors = {name: tensor for name, tensor in checkpoint.tensors.items() if name not in gone}
    return replace(checkpoint, tensors=tensors), replace(found, owned=found.owned - gone)


def _layer(model: Any, part: str) -> nn.Module:
    """The model's own embedding or LM head, which may be the same."""
    embedding = find_seams(model).embedding
    owner = getattr(model, "language_model", model)
    return embedding if part == "embed_tokens" else owner.get("lm_head", embedding)


def _is_copy(name: str, tensors: Mapping[str, LazyTensor], layer: Any) -> bool:
    """Whether rows of a stored matrix are those of the layer, as far as rounding leaves them."""
    rows = min(tensors[name].shape[0], layer.weight.shape[0])
    ids = np.linspace(0, rows - 1, min(_ROWS, rows)).astype(np.int64)
    ours = _rows_of_layer(layer, mx.array(ids))
    theirs = _stored_rows(name, tensors, ids, ours.shape[-1])
    if theirs.shape != ours.shape:
        return False
    lengths = np.linalg.norm(ours, axis=1) * np.linalg.norm(theirs, axis=1)
    return bool(np.mean((ours * theirs).sum(axis=1) / np.maximum(lengths, 1e-12)) > _ALIKE)


def _rows_of_layer(layer: Any, ids: mx.array) -> np.ndarray:
    """[n, D] float32."""
    weight = layer.weight[ids]
    if "scales" in layer:
        biases = layer.biases[ids] if layer.get("biases") is not None else None
        weight = mx.dequantize(
            weight, layer.scales[ids], biases, layer.group_size, layer.bits, mode=layer.mode
        )
    return np.array(weight.astype(mx.float32))


def _stored_rows(name: str, tensors: Mapping[str, LazyTensor], ids: np.ndarray, width: int) -> np.ndarray:
    """[n, D] float32."""
    if not is_packed(name, tensors):
        return to_float32(np.asarray(tensors[name].load()[ids]), tensors[name].dtype)
    packing = packing_of(name, (tensors[name].shape[0], width), tensors)
    stem = name.removesuffix(".weight")
    scales, affine = tensors[f"{stem}.scales"], packing.mode == "affine"

    def rows(part: LazyTensor) -> mx.array:
        return mx.array(to_float32(np.asarray(part.load()[ids]), part.dtype))

    whole = mx.dequantize(
        mx.array(np.asarray(tensors[name].load()[ids])),
        rows(scales) if affine else mx.array(np.asarray(scales.load()[ids])),
        rows(tensors[f"{stem}.biases"]) if affine else None,
        packing.group_size,
        packing.bits,
        mode=packing.mode,
    )
    return np.array(whole.astype(mx.float32))
