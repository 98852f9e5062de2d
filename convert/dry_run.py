"""What a conversion would do, in lines for people (`mtp-mlx convert --dry-run`). Needs no mlx."""

from __future__ import annotations

from pathlib import Path

from mtp_mlx.adapter_folder import sidecar
from mtp_mlx.convert.adapters import peft_plan, ptp_plan
from mtp_mlx.convert.gguf.plan import plan
from mtp_mlx.convert.heads.plan import AS_FAMILY, Overrides, find_heads, heads_beside_trunk, plan_heads
from mtp_mlx.convert.heads.report import plan_lines, source_line
from mtp_mlx.convert.read.checkpoint import Checkpoint


def checkpoint_lines(
    checkpoint: Checkpoint, *, heads: bool = True, trunk: bool = True, overrides: Overrides = AS_FAMILY
) -> list[str]:
    """The plan of a checkpoint: its heads, tensor by tensor, and its trunk; or the adapter that it becomes.

    Args:
        heads, trunk: whether they would be converted.
        overrides: conventions to use instead of the family's.

    Raises ConversionError: what the conversion would raise, as far as can be told without weights and base.
    """
    if ptp_plan.is_ptp_checkpoint(checkpoint):
        return [source_line(checkpoint), ptp_plan.student_line(checkpoint)]
    if peft_plan.is_peft(checkpoint):
        return peft_plan.plan_lines(checkpoint)
    found = heads_beside_trunk(checkpoint, heads) if trunk else find_heads(checkpoint)
    if not trunk or (heads and found is not None):
        lines = plan_lines(checkpoint, plan_heads(checkpoint, found, overrides))
    else:
        kind = checkpoint.text_config.get("model_type", "?")
        beside = sidecar(checkpoint.path)
        told = "none" if beside is None else f"converted before, in {beside}"
        lines = [source_line(checkpoint), f"model type: {kind}", f"heads: {told}"]
    if trunk:
        count = len(checkpoint.tensors.keys() - (set() if found is None else found.owned))
        lines.append(
            f"trunk: {count} tensors, "
            + ("through mlx-lm" if count else "so only `heads_only` can convert it")
        )
    return lines


def gguf_lines(path: Path) -> list[str]:
    """What a .gguf file holds and what becomes of it.

    Raises ConversionError: what the conversion would raise, as far as can be told without weights.
    """
    planned = plan(path)
    gguf = planned.gguf
    kinds = sorted({info.type_name for info in gguf.tensors.values()})
    files = f", in {len(gguf.files)} files" if len(gguf.files) > 1 else ""
    return [
        f"source: {path} (gguf, {len(gguf.tensors)} tensors{files}: {', '.join(kinds)})",
        f"architecture: {planned.config['model_type']}",
        f"generation ends at: {', '.join(planned.ends) or 'no token'}",
        "heads: none are read from a .gguf file",
    ]
