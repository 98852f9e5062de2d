"""Converts only the MTP heads of a checkpoint, to an adapter folder (`mtp-mlx convert --heads-only`)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from mtp_mlx.adapter_folder import CONFIG_NAME
from mtp_mlx.convert.heads.families import Found
from mtp_mlx.convert.heads.plan import AS_FAMILY, Overrides, plan_heads
from mtp_mlx.convert.heads.quantise import quantise_folder
from mtp_mlx.convert.heads.write import Base, fill_folder, trunk_name
from mtp_mlx.convert.read.checkpoint import Checkpoint
from mtp_mlx.convert.trunk import trunk_identity
from mtp_mlx.errors import ConversionError
from mtp_mlx.files import check_out, new_folder


def convert_heads(
    checkpoint: Checkpoint,
    found: Found | None,
    out: str | Path,
    *,
    overrides: Overrides = AS_FAMILY,
    base: Base | None = None,
    quantize: int | None = None,
    force: bool = False,
    progress: Callable[[str], None] | None = None,
) -> Path:
    """Write the heads of `checkpoint` into the adapter folder `out`, whole or not at all, and return its path.

    Args:
        found: its heads, as `find_heads` found them.
        overrides: conventions to use instead of the family's.
        base: the model that the heads are for; None for the trunk beside them.
        quantize: bits to quantise the heads to, None for none.
        force: replace `out` if it is an adapter folder already.
        progress: called with the name of each tensor before it is written.

    Raises MTPError: no heads, or tensors that do not fit (one message lists them all); a PEFT adapter, which has no
        heads; `out` exists; a full disk.
    """
    out = Path(out)
    plan = plan_heads(checkpoint, found, overrides)
    if plan.convention.kind == "lora":
        raise ConversionError(
            f"{checkpoint.path}: this is a PEFT adapter, which has no MTP heads; convert it with "
            "`adapters.peft.write_peft`"
        )
    check_out(out, force=force, mark=CONFIG_NAME, kind="an adapter folder", source=checkpoint.path)
    base = base or Base(trunk_name(checkpoint), *trunk_identity(checkpoint, found))
    with new_folder(out) as folder:
        fill_folder(folder, checkpoint, plan, base, progress=progress)
        if quantize is not None:
            quantise_folder(folder, quantize)
    return out
