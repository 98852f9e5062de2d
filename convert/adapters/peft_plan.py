"""Checks a PEFT LoRA folder by its names and settings, and says how it will be converted. Needs no mlx.

    adapter_model.safetensors    <layer>.lora_A.weight [r, in], <layer>.lora_B.weight [out, r]
    adapter_config.json          r, lora_alpha, use_rslora, ...

A mask-token adapter needs slot embeddings too: `slot_embeddings.weight` [k, D], as PEFT writes a module named in
modules_to_save, or the rows of an `embed_tokens.weight` beyond the base's vocabulary. All names may begin with
base_model.model., as PEFT's do. `peft` writes the adapter folder.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping

from mtp_mlx.convert.heads.other_forms import find_lora
from mtp_mlx.convert.heads.report import source_line
from mtp_mlx.convert.heads.targets import Target
from mtp_mlx.convert.read.checkpoint import Checkpoint
from mtp_mlx.convert.read.lazy_tensor import FLOATS, LazyTensor
from mtp_mlx.errors import ConversionError

SLOTS = "slot_embeddings.weight"
_PREFIX = re.compile(r"^(base_model\.model\.)?")
_EMBEDDING = re.compile(r"(model\.)?embed_tokens(\.modules_to_save\.default)?\.weight")
# Settings of PEFT that change what the factors mean, with the values that do not.
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
# Initialisations that subtract the first factors from the base's weights, so the factors do not fit the base itself.
_CHANGES_BASE = ("pissa", "olora", "corda", "lora_ga")


def is_peft(checkpoint: Checkpoint) -> bool:
    """Whether the checkpoint holds LoRA factors under PEFT's names."""
    return any(".lora_A." in name or ".lora_B." in name for name in checkpoint.tensors)


def check_settings(checkpoint: Checkpoint) -> None:
    """Raises ConversionError if settings are missing, or gated LoRA does not support some (lists all)."""
    config = checkpoint.config
    if checkpoint.config_name != "adapter_config.json":
        raise ConversionError(
            f"{checkpoint.path}: there is no adapter_config.json beside the factors, so lora_alpha, the scale of the "
            "update, is unknown; put the adapter's own there"
        )
    alpha = config.get("lora_alpha")
    if isinstance(alpha, bool) or not isinstance(alpha, (int, float)) or not math.isfinite(alpha):
        raise ConversionError(
            f"{checkpoint.path}: lora_alpha in adapter_config.json is {alpha!r}, a number expected; use the "
            "adapter's own file"
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
            f"{checkpoint.path}: adapter_config.json has {', '.join(odd)}, which gated LoRA does not support; train "
            "a plain LoRA without it"
        )


def split(tensors: Mapping[str, LazyTensor]) -> tuple[dict[str, LazyTensor], dict[str, LazyTensor]]:
    """The tensors that are not low-rank factors, by names without PEFT's prefix; and the factors."""
    factors = {name: tensor for name, tensor in tensors.items() if re.search(r"\.lora_[AB]\.", name)}
    return {_PREFIX.sub("", name): t for name, t in tensors.items() if name not in factors}, factors


def factor_targets(checkpoint: Checkpoint, factors: Mapping[str, LazyTensor]) -> list[Target]:
    """`low_rank.<layer>.down` [in, r] and `.up` [r, out] of every layer.

    Raises ConversionError: a layer with one factor only, factors that do not fit each other, or different ranks.
    """
    try:
        found = find_lora(factors, checkpoint.config)
    except ConversionError as error:  # what raised it does not know the path
        raise ConversionError(f"{checkpoint.path}: {error}") from error
    targets = [] if found is None else found.targets
    known = {name for target in targets for name, _ in target.sources}
    problems = [f"{name} is not a known factor" for name in factors if name not in known]
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
            f"{checkpoint.path}: its layers have the ranks {sorted(ranks)}; all must have the same"
        )
    if checkpoint.config.get("r", *ranks) not in ranks:
        raise ConversionError(
            f"{checkpoint.path}: r in adapter_config.json is {checkpoint.config['r']!r}, but the factors have rank "
            f"{max(ranks)}; use the adapter's own file"
        )
    return targets


def slot_tables(others: Mapping[str, LazyTensor]) -> list[str]:
    """Names of the tensors that may hold slot embeddings."""
    return [SLOTS] if SLOTS in others else [name for name in others if _EMBEDDING.fullmatch(name)]


def no_slots(checkpoint: Checkpoint, beyond: str) -> ConversionError:
    """The error for an adapter without slot embeddings; `beyond` names the vocabulary whose end was looked beyond."""
    return ConversionError(
        f"{checkpoint.path}: a LoRA adapter cannot draft without slot embeddings: the file has neither "
        f"slot_embeddings.weight nor an embed_tokens.weight with rows beyond {beyond}; train an adapter with "
        "'mtp-mlx train'"
    )


def plan_lines(checkpoint: Checkpoint) -> list[str]:
    """The plan in lines for people.

    Raises ConversionError: what the conversion would raise, as far as can be told without the base.
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
        "family: PEFT LoRA adapter, becomes a mask-token adapter of the model given as `base`",
        f"layers: {len(targets) // 2} of rank {targets[0].shape[1]}",
        f"slots: {slots}",
        f"sampler head: {'from the file' if sampler else 'none in the file, an untrained one is written'}",
        "tensors:",
        *[f"  {t.name} {list(t.shape)} <- {t.sources[0][0]}, transposed" for t in targets],
    ]
