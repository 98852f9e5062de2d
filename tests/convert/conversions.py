"""Conversions from a path on, as the command line chains them: open, find the heads, plan, write."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mtp_mlx.convert.heads.plan import AS_FAMILY, Overrides, find_heads, heads_beside_trunk, plan_heads
from mtp_mlx.convert.heads.speculators import write_speculators
from mtp_mlx.convert.heads.targets import HeadPlan
from mtp_mlx.convert.heads_only import convert_heads
from mtp_mlx.convert.read.checkpoint import open_checkpoint
from mtp_mlx.convert.whole import DEFAULT, Converted, WholeSettings, convert_whole


def plan(source: Path, overrides: Overrides = AS_FAMILY) -> HeadPlan:
    """The plan of a checkpoint's heads."""
    checkpoint = open_checkpoint(source)
    return plan_heads(checkpoint, find_heads(checkpoint), overrides)


def whole_model(source: Path, out: Path, settings: WholeSettings = DEFAULT) -> Converted:
    """A checkpoint as a model folder."""
    checkpoint = open_checkpoint(source)
    return convert_whole(checkpoint, heads_beside_trunk(checkpoint, settings.heads), out, settings)


def heads_folder(source: Path, out: Path, **options: Any) -> Path:
    """A checkpoint's heads as an adapter folder."""
    checkpoint = open_checkpoint(source)
    return convert_heads(checkpoint, find_heads(checkpoint), out, **options)


def speculators_folder(source: Path, out: Path, overrides: Overrides = AS_FAMILY, **options: Any) -> Path:
    """A checkpoint's heads in the speculators layout."""
    checkpoint = open_checkpoint(source)
    return write_speculators(
        checkpoint, plan_heads(checkpoint, find_heads(checkpoint), overrides), out, **options
    )
