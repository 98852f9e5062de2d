"""Describes a checkpoint and the conversion of its heads for people. Needs no mlx."""

from __future__ import annotations

from typing import Any

from mtp_mlx.convert.heads.plan import find_heads
from mtp_mlx.convert.heads.targets import HeadPlan, Target
from mtp_mlx.convert.read.checkpoint import Checkpoint
from mtp_mlx.drafters.gemma4_assistant.config import AssistantConfig, is_assistant, shown
from mtp_mlx.drafters.heads.convention import HeadConvention
from mtp_mlx.errors import ConversionError


def describe(checkpoint: Checkpoint) -> dict[str, Any]:
    """Facts about a checkpoint for `mtp-mlx info`: container, size, model type, heads. Reads no weights."""
    config = checkpoint.config if is_assistant(checkpoint.config) else checkpoint.text_config
    facts: dict[str, Any] = {
        "kind": "checkpoint",
        "path": str(checkpoint.path),
        "container": checkpoint.container,
        "files": checkpoint.files,
        "type": config.get("model_type", "?"),
        "tensors": len(checkpoint.tensors),
        "size": sum(tensor.n_bytes for tensor in checkpoint.tensors.values()),
        "types": types(checkpoint),
    }
    return facts | {"mtp heads": describe_heads(checkpoint)}


def describe_heads(checkpoint: Checkpoint) -> dict[str, Any] | str:
    """Family, number and convention of the heads; or "none", or why they cannot be used."""
    if is_assistant(checkpoint.config):
        return _assistant(checkpoint)
    try:
        found = find_heads(checkpoint)
    except ConversionError as error:
        return f"not usable: {error}"
    if found is None:
        return "none"
    if found.convention.kind == "lora":  # not heads, so without a number and a convention
        return {"family": found.title}
    facts: dict[str, Any] = {"family": found.title, "count": found.count}
    return facts | {"convention": convention_facts(found.convention)}


def _assistant(checkpoint: Checkpoint) -> dict[str, Any] | str:
    """An assistant's shape, or why it cannot be used."""
    try:
        return shown(AssistantConfig.of(checkpoint.config))
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        return f"not usable: {checkpoint.config_name} does not describe a Gemma 4 assistant ({error})"


def types(checkpoint: Checkpoint) -> str:
    """How many tensors of each number type."""
    counts: dict[str, int] = {}
    for tensor in checkpoint.tensors.values():
        counts[tensor.dtype] = counts.get(tensor.dtype, 0) + 1
    return ", ".join(f"{count} {dtype}" for dtype, count in sorted(counts.items()))


def convention_facts(convention: HeadConvention) -> dict[str, Any]:
    """The fields of a convention that apply to its kind of heads, with readable names."""
    facts = convention.to_json()
    for name in ("family", "kind", "rope_position"):
        facts.pop(name)
    return {name.replace("_", " "): value for name, value in facts.items() if value not in ("", [])}


def source_line(checkpoint: Checkpoint) -> str:
    """Where the checkpoint is and how it is stored."""
    return (
        f"source: {checkpoint.path} ({checkpoint.container}, {len(checkpoint.files)} file(s), "
        f"{len(checkpoint.tensors)} tensors: {types(checkpoint)})"
    )


def plan_lines(checkpoint: Checkpoint, plan: HeadPlan) -> list[str]:
    """The plan: family, heads, the source of every tensor, what is left out."""
    lines = [
        source_line(checkpoint),
        f"family: {plan.title}",
        f"heads: {plan.count}",
        "convention:",
        *[f"  {name}: {_text(value)}" for name, value in convention_facts(plan.convention).items()],
    ]
    if plan.blocks:
        block = plan.blocks[0]
        lines.append(f"block: mlx_lm.models.{block.module}.{block.class_name}")
    lines += ["tensors:", *[f"  {_line(target, checkpoint)}" for target in plan.targets]]
    if plan.dropped:
        lines += ["dropped, equal to the trunk's byte for byte:", *[f"  {a} = {b}" for a, b in plan.dropped]]
    if plan.notes:
        lines += ["notes:", *[f"  {note}" for note in plan.notes]]
    return lines


def _line(target: Target, checkpoint: Checkpoint) -> str:
    names = [name for name, _ in target.sources]
    stored = names[0] if len(names) == 1 else f"{names[0]} .. {names[-1]} ({len(names)})"
    how = f", {target.step.text}" if target.step.text else ""
    return f"{target.name} {list(target.shape)} {target.dtype(checkpoint.tensors)} <- {stored}{how}"


def _text(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return ", ".join(value) if isinstance(value, list) else str(value)
