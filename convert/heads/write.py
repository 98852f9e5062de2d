"""Writes planned heads into an adapter folder (its config: `mtp_mlx.drafters.heads.config`). Needs no mlx.

mtp.safetensors holds the tensors that `targets` names, in the checkpoint's types: every norm is a plain gain and
every fuse weight embedding-first, however the convention says they were stored. Tensors are written one at a time, so
heads of many gigabytes need no more memory than their largest tensor. The base's fingerprint is null if mlx-lm cannot
load a trunk from the checkpoint, and is then not checked.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from mtp_mlx.adapter_folder import WEIGHTS_NAME, Header, model_card, put_texts
from mtp_mlx.convert.heads.packed import PACKED
from mtp_mlx.convert.heads.targets import HeadPlan, Target, save_targets
from mtp_mlx.convert.read.checkpoint import Checkpoint
from mtp_mlx.drafters.heads.config import HeadsConfig, card_lines, heads_header

if TYPE_CHECKING:
    import mlx.nn as nn

    from mtp_mlx.model.base_sample import BaseSample


@dataclass(frozen=True)
class Base:
    """The model that heads are for.

    Attributes:
        name: what the folder calls it.
        fingerprint: as `mtp_mlx.model.fingerprint` makes it; None if it is not known.
        unknown_because: why it is not known; empty if it is.
        sample: of its weights, see `mtp_mlx.model.base_sample`.
    """

    name: str
    fingerprint: str | None = None
    unknown_because: str = ""
    sample: BaseSample | None = None

    @staticmethod
    def of(name: str, model: nn.Module) -> Base:
        """A bare model that is at hand."""
        from mtp_mlx.model.fingerprint import fingerprint_of, sample_base

        fingerprint, reason = fingerprint_of(model)
        return Base(name, fingerprint, reason, None if fingerprint is None else sample_base(model))

    @property
    def notes(self) -> list[str]:
        """What the folder's notes say about it."""
        reason = self.unknown_because
        return [f"the base's fingerprint is not known: {reason}"] if reason else []


def fill_folder(
    folder: Path,
    checkpoint: Checkpoint,
    plan: HeadPlan,
    base: Base,
    *,
    dtype: str | None = None,
    progress: Callable[[str], None] | None = None,
) -> None:
    """Write the files of an adapter folder into the existing folder `folder`.

    Args:
        base: the model that the heads are for.
        dtype: "F32", "BF16" or "F16" to cast the tensors to; None to keep their stored types.
        progress: called with the name of each tensor before it is written.
    """
    header = planned_header(checkpoint, plan, base)
    save_targets(folder / WEIGHTS_NAME, plan.targets, checkpoint.tensors, progress, dtype)
    sizes = {target.name: math.prod(target.shape) * 32 // _bits(target, plan) for target in plan.targets}
    put_texts(folder, header, model_card(header, card_lines(folder, header), sizes))


def _bits(target: Target, plan: HeadPlan) -> int:
    """Bits of each number of a packed matrix; 32 for any other tensor."""
    if target.dtypes != PACKED:
        return 32
    layers = plan.quantization.get("layers", {})
    return int(layers.get(target.name.removesuffix(".weight"), plan.quantization)["bits"])


def planned_header(checkpoint: Checkpoint, plan: HeadPlan, base: Base) -> Header:
    """What the folder will say about itself."""
    config = HeadsConfig(
        convention=plan.convention,
        blocks=[block.to_json() for block in plan.blocks],
        model_config=plan.model_config,
        drafts=plan.drafts,
        count=plan.count,
        quantization=plan.quantization,
    )
    source = {
        "family": plan.title,
        "files": checkpoint.files,
        "dropped": [{"tensor": name, "same_as": trunk} for name, trunk in plan.dropped],
        "notes": [*plan.notes, *base.notes],
    }
    return heads_header(config, base.name, base.fingerprint, source=source, base_sample=base.sample)


def trunk_name(checkpoint: Checkpoint) -> str:
    """The name of the base: as the configuration says (Medusa's does), otherwise the folder's name."""
    named = checkpoint.config.get("base_model_name_or_path")
    if isinstance(named, str) and named:
        return named
    return checkpoint.folder.resolve().name
