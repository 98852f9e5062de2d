"""Builds head modules from an adapter's config, still without their weights."""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any, Protocol, cast

import mlx.core as mx
import mlx.nn as nn

from mtp_mlx.adapter_folder import CONFIG_NAME
from mtp_mlx.drafters.heads.cascade import MTPHeads
from mtp_mlx.drafters.heads.convention import HeadConvention
from mtp_mlx.drafters.heads.draft_heads import DraftHeads
from mtp_mlx.drafters.heads.medusa import MedusaHead, MedusaHeads
from mtp_mlx.drafters.heads.mtp_head import MTPHead, block_like, blocks_like, last_layers, norm_eps
from mtp_mlx.drafters.heads.parallel import ParallelHead, ParallelHeads
from mtp_mlx.drafters.heads.taps import TapFusion
from mtp_mlx.errors import MTPError
from mtp_mlx.model.seams import embedding_shape, find_seams

LAST_LAYER = {"like": "last layer"}
LAST_LAYERS = "last layers"
BLOCK_MODULES = "mlx_lm.models."

# For each kind of heads, the supported values of its convention.
_RUNS: dict[str, dict[str, tuple[str, ...]]] = {
    "cascade": {
        "first_hidden": ("post-norm", "pre-norm", "before-last-layer"),
        "recycled_hidden": ("normed", "raw", "trunk"),
        "output_norm": ("own", "identity", "trunk"),
        "embedding": ("shared", "own"),
        "lm_head": ("shared", "own"),
        "rope_position": ("hidden",),
    },
    "medusa": {
        "first_hidden": ("post-norm", "pre-norm"),
        "recycled_hidden": ("none",),
        "output_norm": ("identity",),
        "lm_head": ("own",),
    },
    "parallel": {
        "first_hidden": ("before-last-layer",),
        "recycled_hidden": ("none",),
        "output_norm": ("trunk",),
        "lm_head": ("shared",),
    },
}


class Described(Protocol):
    """The fields of `mtp_mlx.drafters.heads.config.HeadsConfig` that are needed here."""

    convention: HeadConvention
    blocks: list[dict[str, Any]]
    model_config: dict[str, Any]
    drafts: int
    count: int
    taps: list[int]


def check_runnable(folder: Path, convention: HeadConvention) -> None:
    """Raises MTPError for a convention that is not supported."""
    allowed = {"kind": tuple(_RUNS)} | _RUNS.get(convention.kind, {})
    for name, runs in allowed.items():
        value = getattr(convention, name)
        if value not in runs:
            raise MTPError(
                f"the heads in {folder} are not supported yet: their {name.replace('_', ' ')} is '{value}', and only "
                f"{' and '.join(repr(run) for run in runs)} can be run; use `adapter` none"
            )


def build_heads(
    folder: Path, info: Described, model: nn.Module, names: Collection[str], draft_ids: mx.array | None
) -> DraftHeads:
    """Heads of the form that their convention says, for a bare `model`; their weights are loaded later.

    Args:
        folder: their adapter folder, for messages.
        info: the config of the heads.
        model: the bare base model.
        names: names of the tensors in the folder, which tell how many residual layers Medusa's heads have.
        draft_ids: [N] int32 ids that may be drafted, or None for all.

    Raises:
        MTPError: if a block cannot be built, or the model lacks a seam.
    """
    build: Callable[..., DraftHeads]
    build = {"cascade": _cascade, "medusa": _medusa, "parallel": _parallel}[info.convention.kind]
    return build(folder, info, model, names, draft_ids)


def _cascade(
    folder: Path, info: Described, model: nn.Module, names: Collection[str], draft_ids: mx.array | None
) -> DraftHeads:
    seams = find_seams(model)
    vocab_size, size = embedding_shape(seams.embedding)
    eps = norm_eps(seams.trunk)
    heads = []
    for spec in info.blocks:
        block = _block(folder, spec, info.model_config, seams.trunk)
        heads.append(MTPHead(block, size, eps, info.convention, vocab_size, spec.get("window")))
    fusion = TapFusion(info.taps, size, eps) if info.taps else None
    return MTPHeads(heads, info.convention, draft_ids, info.drafts, fusion)


def _medusa(
    folder: Path, info: Described, model: nn.Module, names: Collection[str], draft_ids: mx.array | None
) -> DraftHeads:
    vocab_size, size = embedding_shape(find_seams(model).embedding)
    layers = sum(bool(re.fullmatch(r"heads\.0\.residual\.\d+\.weight", name)) for name in names)
    heads = [MedusaHead(layers, size, vocab_size) for _ in range(info.count)]
    return MedusaHeads(heads, info.convention, draft_ids, _no_more_than(folder, info))


def _parallel(
    folder: Path, info: Described, model: nn.Module, names: Collection[str], draft_ids: mx.array | None
) -> DraftHeads:
    seams, heads = find_seams(model), []
    size = embedding_shape(seams.embedding)[1]
    for spec in info.blocks:
        block = _block(folder, spec, info.model_config, seams.trunk)
        if isinstance(block, list):
            raise MTPError(f"{folder / CONFIG_NAME}: a parallel head has one layer, not {len(block)}")
        heads.append(ParallelHead(block, size))
    return ParallelHeads(heads, info.convention, draft_ids, _no_more_than(folder, info))


def _no_more_than(folder: Path, info: Described) -> int:
    """The number of drafts per step, for heads that cannot be reused in a step."""
    if info.drafts > info.count:
        raise MTPError(
            f"{folder / CONFIG_NAME}: {info.count} head(s) of the kind '{info.convention.kind}' cannot draft "
            f"{info.drafts} tokens per step"
        )
    return info.drafts


def block_spec(trunk: nn.Module, layers: int) -> dict[str, Any]:
    """How a config describes a block that is a copy of the trunk's last layers, see `last_layers`.

    Raises:
        MTPError: if the trunk has fewer.
    """
    very_last = last_layers(trunk, layers) == [len(trunk.layers) - 1]
    return dict(LAST_LAYER) if very_last else {"like": LAST_LAYERS, "layers": layers}


def _block(
    folder: Path, spec: dict[str, Any], model_config: dict[str, Any], trunk: nn.Module
) -> nn.Module | list[nn.Module]:
    """A head's decoder block as its config describes it: one layer, or a list of several.

    Raises:
        MTPError: if it cannot be built, or more than one of its layers has attention.
    """
    if spec == LAST_LAYER:
        return block_like(trunk)
    if spec.get("like") == LAST_LAYERS and isinstance(spec.get("layers"), int):
        return blocks_like(trunk, spec["layers"])
    path = Path(folder) / CONFIG_NAME
    try:
        module, layers = str(spec["module"]), spec["layers"]
        if [layer.get("block_type") for layer in layers].count("*") > 1:
            raise MTPError(
                f"the heads in {folder} are not supported yet: each has several layers with attention, and only "
                "heads with one can be run; use `adapter` none"
            )
        if not module.startswith(BLOCK_MODULES) or not module.removeprefix(BLOCK_MODULES).isidentifier():
            raise ValueError(f"{module} is not a module of {BLOCK_MODULES.rstrip('.')}")
        found = importlib.import_module(module)
        arguments = getattr(found, spec["args_class"]).from_dict({**model_config, **spec["overrides"]})
        kind = getattr(found, spec["class"])
        if not layers or not isinstance(kind, type) or not issubclass(kind, nn.Module):
            raise TypeError(f"{spec['class']} is not a layer")  # nothing else may be called
        blocks = [cast(Any, kind)(arguments, **layer) for layer in layers]
        return blocks if len(blocks) > 1 else blocks[0]
    except (ImportError, AttributeError, KeyError, TypeError, ValueError) as error:
        raise MTPError(f"{path}: a head's block cannot be built: {error}") from error
