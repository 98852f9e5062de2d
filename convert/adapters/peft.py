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

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mtp_mlx.adapter_folder import CONFIG_NAME
from mtp_mlx.convert.heads.other_forms import find_lora
from mtp_mlx.convert.heads.report import source_line
from mtp_mlx.convert.heads.targets import Target
from mtp_mlx.convert.read.checkpoint import Checkpoint
from mtp_mlx.convert.read.lazy_tensor import FLOATS, LazyTensor
from mtp_mlx.drafters.masks.folder import AdapterInfo, save_adapter
from mtp_mlx.drafters.masks.weights import MaskAdapterConfig, new_adapter
from mtp_mlx.errors import ConversionError, MTPError
from mtp_mlx.files import check_out
from mtp_mlx.model.fingerprint import base_fingerprint
from mtp_mlx.model.seams import embedding_shape


def write_peft(
    checkpoint: Checkpoint, base: nn.Module, base_name: str, out: str | Path, *, force: bool = False
) -> Path:
    """Write the adapter folder `out` for the bare model `base`.

    Raises MTPError: `out` exists; a setting of PEFT that is not supported; no slot embeddings; or tensors that do
    not fit the base (all are named).
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


def _draft_ids(checkpoint: Checkpoint, others: dict[str, LazyTensor], vocab_size: int) -> mx.array | None:
    """[N] int32 ids that may be drafted, taken out of `others`; None where there are none.

    Raises ConversionError: they are no different ids of the base's vocabulary.
    """
    stored = others.pop("draft_ids", None)
    if stored is None:
        return None
    ids = stored.load() if len(stored.shape) == 1 and stored.dtype[:1] in "IU" else np.zeros(0, np.int64)
    if not len(ids) or len(np.unique(ids)) < len(ids) or ids.min() < 0 or ids.max() >= vocab_size:
        raise ConversionError(
            f"{checkpoint.path}: draft_ids must be a list of different whole numbers, all below the {vocab_size} of "
            "the base's vocabulary; leave them out, or write them again"
        )
    return mx.array(ids.astype(np.int32))


def _check_others(checkpoint: Checkpoint, others: dict[str, LazyTensor]) -> None:
    """Raises ConversionError for what is no array of floats, with every name."""
    odd = [
        f"{name} is {tensor.dtype} {list(tensor.shape)}"
        for name, tensor in others.items()
        if tensor.dtype not in FLOATS or not tensor.shape
    ]
    if odd:
        raise ConversionError(
            f"{checkpoint.path}: {'; '.join(odd[:8])}, and arrays of a float type are expected"
        )


def _slots(checkpoint: Checkpoint, others: dict[str, LazyTensor], vocab_size: int) -> mx.array:
    """[k, D] slot embeddings, taken out of `others`.

    Raises ConversionError: there are none.
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


SLOTS = "slot_embeddings.weight"


_PREFIX = re.compile(r"^(base_model\.model\.)?")


_EMBEDDING = re.compile(r"(model\.)?embed_tokens(\.modules_to_save\.default)?\.weight")


# Settings of PEFT that change what the factors mean, and what they are if they change nothing.
_PLAIN: dict[str, object] = {
    "use_dora": False,
    "lora_bias": False,
    "fan_in_fan_out": False,
    "bias": "none",
    "rank_pattern": {},
    "alpha_pattern": {},
    "use_qalora": False,
    "layer_replication": [],
    "target_parameters": [],
    "trainable_token_indices": [],
    "alora_invocation_tokens": [],
}


# Ways of drawing the first factors that take them off the base's weights, so that they are no update of the base.
_CHANGES_BASE = ("pissa", "olora", "corda", "lora_ga")


def is_peft(checkpoint: Checkpoint) -> bool:
    """Whether the checkpoint holds LoRA factors under PEFT's names."""
    return any(".lora_A." in name or ".lora_B." in name for name in checkpoint.tensors)


def check_settings(checkpoint: Checkpoint) -> None:
    """Raises ConversionError for a setting that gated LoRA has no form for (all are named), or no settings at all."""
    config = checkpoint.config
    if checkpoint.config_name != "adapter_config.json":
        raise ConversionError(
            f"{checkpoint.path}: there is no adapter_config.json beside the factors, and without its lora_alpha "
            "nobody knows how large an update they make; put the adapter's own there"
        )
    alpha = config.get("lora_alpha")
    if isinstance(alpha, bool) or not isinstance(alpha, (int, float)) or not math.isfinite(alpha):
        raise ConversionError(
            f"{checkpoint.path}: adapter_config.json says lora_alpha {alpha!r}, a number expected; use the adapter's "
            "own file"
        )
    kind = config.get("peft_type", "LORA")
    odd = [f"peft_type {kind}"] if kind != "LORA" else []
    odd += [
        f"{name} {config[name]!r}"
        for name, plain in _PLAIN.items()
        if config.get(name, plain) not in (plain, None)
    ]
    start = str(config.get("init_lora_weights")).lower()
    odd += [f"init_lora_weights {start!r}"] if start.startswith(_CHANGES_BASE) else []
    if odd:
        raise ConversionError(
            f"{checkpoint.path}: adapter_config.json says {', '.join(odd)}, which gated LoRA has no form for; train "
            "a plain LoRA without it"
        )


def split(tensors: Mapping[str, LazyTensor]) -> tuple[dict[str, LazyTensor], dict[str, LazyTensor]]:
    """Those that are no factors, by names without PEFT's prefix; and the factors."""
    factors = {name: tensor for name, tensor in tensors.items() if re.search(r"\.lora_[AB]\.", name)}
    return {_PREFIX.sub("", name): t for name, t in tensors.items() if name not in factors}, factors


def factor_targets(checkpoint: Checkpoint, factors: Mapping[str, LazyTensor]) -> list[Target]:
    """`low_rank.<layer>.down` [in, r] and `.up` [r, out] of every layer.

    Raises ConversionError: a layer has only one of its two factors, they do not fit each other, or ranks differ.
    """
    try:
        found = find_lora(factors, checkpoint.config)
    except ConversionError as error:  # it does not know where the names come from
        raise ConversionError(f"{checkpoint.path}: {error}") from error
    targets = [] if found is None else found.targets
    known = {name for target in targets for name, _ in target.sources}
    problems = [f"{name} is no factor that is known" for name in factors if name not in known]
    for target in targets:
        name, shape = target.sources[0]
        if name not in factors:
            problems.append(f"missing {name}")
        elif factors[name].shape != shape:
            problems.append(f"{name} is {list(factors[name].shape)}, {list(shape)} expected")
        elif factors[name].dtype not in FLOATS:
            problems.append(f"{name} is of type {factors[name].dtype}, a float type expected")
    if problems:
        raise ConversionError(
            f"{checkpoint.path}: its factors do not fit each other: {'; '.join(problems[:8])}"
        )
    ranks = {target.shape[1] for target in targets if target.name.endswith(".down")}
    if len(ranks) != 1:
        raise ConversionError(
            f"{checkpoint.path}: its layers have the ranks {sorted(ranks)}; only one for all is read"
        )
    if checkpoint.config.get("r", *ranks) not in ranks:
        raise ConversionError(
            f"{checkpoint.path}: adapter_config.json says r {checkpoint.config['r']!r}, its factors have the rank "
            f"{max(ranks)}; use the adapter's own file"
        )
    return targets


def slot_tables(others: Mapping[str, LazyTensor]) -> list[str]:
    """Names of what may hold slot embeddings, the surest first."""
    return [SLOTS] if SLOTS in others else [name for name in others if _EMBEDDING.fullmatch(name)]


def no_slots(checkpoint: Checkpoint, beyond: str) -> ConversionError:
    """The refusal of an adapter without slot embeddings; `beyond` what an embedding would have them."""
    return ConversionError(
        f"{checkpoint.path}: a LoRA adapter without slot embeddings cannot draft: the file has neither "
        f"slot_embeddings.weight nor an embed_tokens.weight with rows beyond {beyond}; train an adapter with "
        "'mtp-mlx train'"
    )


def plan_lines(checkpoint: Checkpoint) -> list[str]:
    """The plan, in words.

    Raises ConversionError: as far as it can be seen without the base, what the conversion would raise.
    """
    check_settings(checkpoint)
    others, factors = split(checkpoint.tensors)
    targets = factor_targets(checkpoint, factors)
    tables = slot_tables(others)
    if not tables:
        raise no_slots(checkpoint, "the base's vocabulary")
    slots = (
        f"{others[SLOTS].shape[0]}"
        if tables == [SLOTS]
        else f"rows of {tables[0]} beyond the base's vocabulary"
    )
    sampler = any(name.startswith("sampler.") for name in others)
    return [
        source_line(checkpoint),
        "family: PEFT LoRA adapter, becomes a mask-token adapter of the model that --base names",
        f"layers: {len(targets) // 2} of rank {targets[0].shape[1]}",
        f"slots: {slots}",
        f"sampler head: {'of the file' if sampler else 'none in the file, an untrained one stands in'}",
        "tensors:",
        *[f"  {t.name} {list(t.shape)} <- {t.sources[0][0]}, transposed" for t in targets],
    ]
