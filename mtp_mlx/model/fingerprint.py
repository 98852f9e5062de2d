"""A fingerprint of a base model that ignores its precision, so that an adapter is not used with another model."""

from __future__ import annotations

import hashlib
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mtp_mlx.errors import MTPError
from mtp_mlx.model.seams import Seams, embedding_shape, find_seams


def base_fingerprint(model: nn.Module) -> str:
    """16 hex digits that identify a base model, whatever its precision.

    It is a hash of the model type, the vocabulary size, the hidden size and every normalisation weight rounded to
    bfloat16: quantising or casting a model does not change these, fine-tuning does.

    Raises:
        MTPError: if the model lacks a seam.
    """
    seams = find_seams(model)
    trunk = seams.trunk
    digest = hashlib.sha256()
    digest.update(f"{getattr(model, 'model_type', '?')} {embedding_shape(_base_embedding(seams))}".encode())
    for name, module in sorted(trunk.named_modules(), key=lambda item: item[0]):
        if "norm" in name.rsplit(".", 1)[-1] and "weight" in module:
            rounded = module["weight"].astype(mx.bfloat16).astype(mx.float32)
            digest.update(name.encode())
            digest.update(np.array(rounded).tobytes())
    return digest.hexdigest()[:16]


def _base_embedding(seams: Seams) -> nn.Module:
    return cast(nn.Module, getattr(seams.embedding, "base", seams.embedding))


def fingerprint_of(model: Any) -> tuple[str | None, str]:
    """(fingerprint of a bare model, ""), or (None, the reason why it has none)."""
    try:
        return base_fingerprint(model), ""
    except MTPError as error:
        return None, str(error)
