"""Converts a PEFT LoRA folder with slot embeddings to a mask-token adapter folder (see `peft_plan`).

A sampler head (`sampler.*`, see `drafters.masks.weights`) and `draft_ids` are converted too if the folder has them.
Without a sampler head an untrained one is written, which leaves every slot's prediction as it is.
"""

from __future__ import annotations

import math
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mtp_mlx.adapter_folder import CONFIG_NAME
from mtp_mlx.convert.adapters.peft_plan import (
    SLOTS,
    check_settings,
    factor_targets,
    no_slots,
    slot_tables,
    split,
)
from mtp_mlx.convert.read.checkpoint import Checkpoint
from mtp_mlx.convert.read.lazy_tensor import FLOATS, LazyTensor
from mtp_mlx.drafters.masks.folder import mask_header, save
from mtp_mlx.drafters.masks.weights import MaskAdapterConfig, new_adapter
from mtp_mlx.errors import ConversionError, MTPError
from mtp_mlx.files import check_out
from mtp_mlx.model.fingerprint import about_base, base_fingerprint
from mtp_mlx.model.seams import embedding_shape


def write_peft(
    checkpoint: Checkpoint, base: nn.Module, base_name: str, out: str | Path, *, force: bool = False
) -> Path:
    """Write the adapter folder `out`, whole or not at all, and return its path.

    Args:
        base: the bare model that the adapter is for.
        base_name: what the folder calls that model.
        force: replace `out` if it is an adapter folder already.

    Raises MTPError: `out` exists; a setting of PEFT that is not supported; no slot embeddings; or tensors that do
    not fit the base (one message lists them all).
    """
    out = Path(out)
    check_out(out, force=force, mark=CONFIG_NAME, kind="an adapter folder", source=checkpoint.path)
    config = checkpoint.config
    check_settings(checkpoint)
    others, factors = split(checkpoint.tensors)
    draft_ids = _draft_ids(checkpoint, others, embedding_shape(base.model.embed_tokens)[0])
    _check_others(checkpoint, others)
    targets = factor_targets(checkpoint, factors)
    tensors = {target.name: mx.array(factors[target.sources[0][0]].float32()).T for target in targets}
    slots = _slots(checkpoint, others, embedding_shape(base.model.embed_tokens)[0])
    rank = targets[0].shape[1]
    alpha = float(config["lora_alpha"])
    sampler = {name: value for name, value in others.items() if name.startswith("sampler.")}
    shape = MaskAdapterConfig(
        slots=slots.shape[0],
        rank=rank,
        # Ours scales the update by alpha / rank, rank-stabilised LoRA by alpha / sqrt(rank).
        alpha=alpha * math.sqrt(rank) if config.get("use_rslora") else alpha,
        target_modules=tuple(sorted({name.rsplit(".", 2)[-2] for name in tensors})),
        sampler_width=sampler["sampler.first.weight"].shape[0] if "sampler.first.weight" in sampler else 1,
        draft_vocab_size=0 if draft_ids is None else len(draft_ids),
    )
    unexpected = [name for name in others if name not in sampler]
    try:
        adapter = new_adapter(base, shape, draft_ids)
        own = adapter.tensors()
        given = tensors | {
            name: _array(tensor) for name, tensor in (sampler | {n: others[n] for n in unexpected}).items()
        }
        given["slot_embeddings.weight"] = slots
        if not sampler:
            given |= {name: value for name, value in own.items() if name.startswith("sampler.")}
        adapter.load_tensors(given)
    except MTPError as error:
        raise ConversionError(f"{checkpoint.path}: {error}") from error
    training = {
        "converted from": "a PEFT adapter",
        "sampler head": "the file's" if sampler else "none, untrained",
    }
    header = mask_header(shape, base_name, base_fingerprint(base), training=training, **about_base(base))
    save(out, adapter, header)
    return out


def _draft_ids(checkpoint: Checkpoint, others: dict[str, LazyTensor], vocab_size: int) -> mx.array | None:
    """[N] int32 ids that may be drafted, taken out of `others`; None if it has none.

    Raises ConversionError: they are not distinct ids of the base's vocabulary.
    """
    stored = others.pop("draft_ids", None)
    if stored is None:
        return None
    ids = stored.load() if len(stored.shape) == 1 and stored.dtype[:1] in "IU" else np.zeros(0, np.int64)
    if not len(ids) or len(np.unique(ids)) < len(ids) or ids.min() < 0 or ids.max() >= vocab_size:
        raise ConversionError(
            f"{checkpoint.path}: draft_ids must be distinct whole numbers below {vocab_size}, the size of the base's "
            "vocabulary; leave them out, or write them again"
        )
    return mx.array(ids.astype(np.int32))


def _check_others(checkpoint: Checkpoint, others: dict[str, LazyTensor]) -> None:
    """Raises ConversionError if any tensor is not a float array (lists all)."""
    odd = [
        f"{name} is {tensor.dtype} {list(tensor.shape)}"
        for name, tensor in others.items()
        if tensor.dtype not in FLOATS or not tensor.shape
    ]
    if odd:
        raise ConversionError(f"{checkpoint.path}: {'; '.join(odd[:8])}, float arrays expected")


def _slots(checkpoint: Checkpoint, others: dict[str, LazyTensor], vocab_size: int) -> mx.array:
    """[k, D] slot embeddings, taken out of `others`.

    Raises ConversionError: it has none.
    """
    for name in slot_tables(others):
        table = others.pop(name)
        if name == SLOTS:
            return _array(table)
        if table.shape[0] > vocab_size:
            return _array(table)[vocab_size:]
    raise no_slots(checkpoint, f"the base's {vocab_size}")


def _array(tensor: LazyTensor) -> mx.array:
    return mx.array(tensor.float32())
