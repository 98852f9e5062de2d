"""MTP heads in an adapter folder: loading and saving. What the folder says of them is in `config.py`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import cast

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten

from mtp_mlx.adapter_folder import DRAFT_IDS, Header, damage, read_tensors, write_adapter_folder
from mtp_mlx.base_check import check_base
from mtp_mlx.drafters.heads.build import LAST_LAYER, build_heads, check_runnable
from mtp_mlx.drafters.heads.config import HeadsConfig, card_lines, config_of, facts, heads_header
from mtp_mlx.drafters.heads.draft_heads import DraftHeads
from mtp_mlx.model.tensor_fit import check_fit, quantise_like

__all__ = ["LAST_LAYER", "HeadsConfig", "card_lines", "config_of", "facts", "heads_header", "load", "save"]


def load(folder: Path, header: Header, model: nn.Module) -> tuple[DraftHeads, Header]:
    """The heads in `folder` for a bare `model`, in the types they are stored in.

    Raises:
        MTPError: if the folder is of another method, for another base, damaged, or of a kind that cannot be run yet.
    """
    config = config_of(folder, header)
    check_runnable(folder, config.convention)
    check_base(folder, header, model)
    tensors = read_tensors(folder)
    draft_ids = tensors.pop(DRAFT_IDS, None)
    heads = build_heads(folder, config, model, tensors.keys(), draft_ids)
    if config.quantization:
        with damage(folder):
            quantise_like(heads, tensors.keys(), config.quantization)
    check_fit(_parameters(heads), tensors)
    heads.update(tree_unflatten(list(tensors.items())))
    heads.eval()
    return heads, header


def save(
    folder: Path, heads: DraftHeads, header: Header, dtype: mx.Dtype | Mapping[str, mx.Dtype] = mx.bfloat16
) -> None:
    """Writes the folder whole or not at all; weights in `dtype`, or each in its own, bfloat16 where it has none.

    Raises:
        MTPError: if it cannot be written.
    """
    tensors = _parameters(heads)
    if heads.draft_ids is not None:
        tensors[DRAFT_IDS] = heads.draft_ids
    write_adapter_folder(folder, header, tensors, card_lines(folder, header), dtype)


def _parameters(heads: DraftHeads) -> dict[str, mx.array]:
    return dict(cast("list[tuple[str, mx.array]]", tree_flatten(heads.parameters())))
