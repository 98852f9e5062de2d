"""A PEFT LoRA folder -> a mask-token adapter folder, where it holds what such an adapter needs.

    adapter_model.safetensors    <layer>.lora_A.weight [r, in], <layer>.lora_B.weight [out, r]
    adapter_config.json          r, lora_alpha, use_rslora, ...

A mask-token adapter needs embeddings of its slots beside the low-rank factors. They are taken from
`slot_embeddings.weight` [k, D], as PEFT writes a module named in modules_to_save, or from the rows that an
`embed_tokens.weight` has beyond the base's vocabulary. A sampler head (`sampler.*`, see `model.sampler_head`) and
`draft_ids` are taken where they are there; without a sampler head an untrained one stands in, which leaves every
slot its own prediction. All names may begin with base_model.model., as PEFT's do.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mtp_mlx.adapter import CONFIG_NAME, AdapterInfo, base_fingerprint, save_adapter
from mtp_mlx.errors import ConversionError, MTPError
from mtp_mlx.model.attach import embedding_shape, new_adapter
from mtp_mlx.model.mask_adapter import MaskAdapterConfig

from .checkpoint import Checkpoint
from .families_other import find_lora
from .heads_write import check_out
from .lazy_tensor import LazyTensor

_PREFIX = re.compile(r"^(base_model\.model\.)?")
_EMBEDDING = re.compile(r"(model\.)?embed_tokens(\.modules_to_save\.default)?\.weight")
# Settings of PEFT that change what the factors mean, and what they are if they change nothing.
_PLAIN: dict[str, Any] = {
    "use_dora": False,
    "lora_bias": False,
    "fan_in_fan_out": False,
    "bias": "none",
    "rank_pattern": {},
    "alpha_pattern": {},
}


def is_peft(checkpoint: Checkpoint) -> bool:
    """Whether the checkpoint holds LoRA factors under PEFT's names."""
    return any(".lora_A." in name or ".lora_B." in name for name in checkpoint.tensors)


def write_peft(
    checkpoint: Checkpoint, base: nn.Module, base_name: str, out: str | Path, *, force: bool = False
) -> Path:
    """Write the adapter folder `out` for the bare model `base`.

    Raises MTPError: `out` exists; a setting of PEFT that is not supported; no slot embeddings; or tensors that do
    not fit the base (all are named).
    """
    out = Path(out)
    check_out(out, force=force, mark=CONFIG_NAME, kind="an adapter folder")
    config = checkpoint.config
    _check_settings(checkpoint)
    others, factors = _split(checkpoint.tensors)
    tensors = _low_rank(checkpoint, factors)
    slots = _slots(checkpoint, others, embedding_shape(base.model.embed_tokens)[0])
    ranks = {array.shape[1] for name, array in tensors.items() if name.endswith(".down")}
    if len(ranks) != 1:
        raise ConversionError(
            f"{checkpoint.path}: its layers have the ranks {sorted(ranks)}; only one for all is read"
        )
    rank = ranks.pop()
    alpha = float(config.get("lora_alpha", rank))
    sampler = {name: value for name, value in others.items() if name.startswith("sampler.")}
    draft_ids = _array(others.pop("draft_ids")).astype(mx.int32) if "draft_ids" in others else None
    shape = MaskAdapterConfig(
        slots=slots.shape[0],
        rank=rank,
        # The update is scaled by alpha / rank; rank-stabilised LoRA scales it by alpha / sqrt(rank).
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
    save_adapter(out, adapter, AdapterInfo(base_name, base_fingerprint(base), shape, training))
    return out


def _check_settings(checkpoint: Checkpoint) -> None:
    config = checkpoint.config
    kind = config.get("peft_type", "LORA")
    odd = [f"peft_type {kind}"] if kind != "LORA" else []
    odd += [
        f"{name} {config[name]!r}"
        for name, plain in _PLAIN.items()
        if config.get(name, plain) not in (plain, None)
    ]
    if odd:
        raise ConversionError(
            f"{checkpoint.path}: adapter_config.json says {', '.join(odd)}, which gated LoRA has no form for; train "
            "a plain LoRA without it"
        )


def _split(tensors: Mapping[str, LazyTensor]) -> tuple[dict[str, LazyTensor], dict[str, LazyTensor]]:
    """Those that are no factors, by names without PEFT's prefix; and the factors."""
    factors = {name: tensor for name, tensor in tensors.items() if re.search(r"\.lora_[AB]\.", name)}
    return {_PREFIX.sub("", name): t for name, t in tensors.items() if name not in factors}, factors


def _low_rank(checkpoint: Checkpoint, factors: Mapping[str, LazyTensor]) -> dict[str, mx.array]:
    """`low_rank.<layer>.down` [in, r] and `.up` [r, out] of every layer.

    Raises ConversionError: a layer has only one of its two factors, or they do not fit each other.
    """
    found = find_lora(factors, checkpoint.config)
    assert found is not None
    problems: list[str] = []
    for target in found.targets:
        name, shape = target.sources[0]
        if name not in factors:
            problems.append(f"missing {name}")
        elif factors[name].shape != shape:
            problems.append(f"{name} is {list(factors[name].shape)}, {list(shape)} expected")
        elif factors[name].dtype not in ("F64", "F32", "F16", "BF16"):
            problems.append(f"{name} is of type {factors[name].dtype}, a float type expected")
    if problems:
        raise ConversionError(
            f"{checkpoint.path}: its factors do not fit each other: {'; '.join(problems[:8])}"
        )
    return {target.name: mx.array(factors[target.sources[0][0]].float32()).T for target in found.targets}


def _slots(checkpoint: Checkpoint, others: dict[str, LazyTensor], vocab_size: int) -> mx.array:
    """[k, D] slot embeddings, taken out of `others`.

    Raises ConversionError: there are none.
    """
    if "slot_embeddings.weight" in others:
        return _array(others.pop("slot_embeddings.weight"))
    for name in [name for name in others if _EMBEDDING.fullmatch(name)]:
        table = others.pop(name)
        if table.shape[0] > vocab_size:
            return _array(table)[vocab_size:]
    raise ConversionError(
        f"{checkpoint.path}: a LoRA adapter without slot embeddings cannot draft: the file has neither "
        f"slot_embeddings.weight nor an embed_tokens.weight with rows beyond the base's {vocab_size}; train an "
        "adapter with 'mtp-mlx train'"
    )


def _array(tensor: LazyTensor) -> mx.array:
    return mx.array(tensor.float32())
