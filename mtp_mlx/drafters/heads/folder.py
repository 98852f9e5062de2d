"""The adapter folder of MTP heads: written by `mtp-mlx convert --heads-only` and by `save_heads`, read here.

`mtp_config.json` names the base, the heads' convention and how each head's decoder block is built: of which class
of mlx-lm (converted heads), or as a copy of the base's last layer (heads trained here, `{"like": "last layer"}`).
`mtp.safetensors` holds `heads.{i}.fuse.weight` and so on, and `draft_ids` where there is a draft vocabulary.
"""

from __future__ import annotations

import dataclasses
import json
import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten

from mtp_mlx.adapter_folder import (
    CONFIG_NAME,
    FORMAT_VERSION,
    WEIGHTS_NAME,
    check_base,
    read_config,
    read_tensors,
)
from mtp_mlx.drafters.heads.build import LAST_LAYER, build_heads, check_runnable
from mtp_mlx.drafters.heads.convention import MOST_HEADS, HeadConvention
from mtp_mlx.drafters.heads.draft_heads import DraftHeads
from mtp_mlx.errors import MTPError
from mtp_mlx.files import new_folder
from mtp_mlx.model.tensor_fit import check_fit

__all__ = ["LAST_LAYER", "HeadsInfo", "is_heads", "load_heads", "read_heads_info", "save_heads"]

METHOD = "mtp-heads"
DRAFT_IDS = "draft_ids"

log = logging.getLogger("mtp_mlx")


@dataclass
class HeadsInfo:
    """What a folder of heads says about itself, apart from weights.

    Attributes:
        base_name: the base model as the user named it.
        base_fingerprint: see `mtp_mlx.model.fingerprint.base_fingerprint`; None where it is not known.
        convention: how the heads are run.
        blocks: one per head, see the module.
        model_config: the configuration that blocks are built from; empty where none is.
        drafts: tokens drafted in each step; heads are applied again in turn where this is more than their number.
        source, training, acceptance, measurements: provenance, and what was measured.
        count: number of heads, by default one per block; Medusa's have no blocks.
    """

    base_name: str
    base_fingerprint: str | None
    convention: HeadConvention
    blocks: list[dict[str, Any]]
    model_config: dict[str, Any] = field(default_factory=dict)
    drafts: int = 0
    source: dict[str, Any] = field(default_factory=dict)
    training: dict[str, Any] = field(default_factory=dict)
    acceptance: list[float] = field(default_factory=list)
    measurements: dict[str, Any] = field(default_factory=dict)
    count: int = 0

    def __post_init__(self) -> None:
        self.count = self.count or len(self.blocks)
        self.drafts = self.drafts or self.count

    def to_json(self) -> dict[str, Any]:
        """The content of `mtp_config.json`."""
        return {
            "format": FORMAT_VERSION,
            "method": METHOD,
            "base": {"name": self.base_name, "fingerprint": self.base_fingerprint},
            "heads": {
                "count": self.count,
                "drafts": self.drafts,
                "convention": self.convention.to_json(),
                "blocks": self.blocks,
                "model_config": self.model_config,
            },
            "source": {"family": self.convention.family} | self.source,
            "training": self.training,
            "acceptance": self.acceptance,
            "measurements": self.measurements,
        }


def is_heads(folder: Path) -> bool:
    """Whether an adapter folder holds MTP heads.

    Raises:
        MTPError: no adapter there.
    """
    return read_config(folder).get("method") == METHOD


def read_heads_info(folder: Path) -> HeadsInfo:
    """Reads `mtp_config.json` of a folder of heads.

    Raises:
        MTPError: no heads there, or a damaged config.
    """
    raw, path = read_config(folder), Path(folder) / CONFIG_NAME
    if raw.get("format") != FORMAT_VERSION or raw.get("method") != METHOD:
        raise MTPError(
            f"{path}: format {raw.get('format')!r}, method {raw.get('method')!r}; MTP heads are format "
            f"{FORMAT_VERSION}, method '{METHOD}'"
        )
    try:
        heads = raw["heads"]
        convention = dict(heads["convention"])
        convention["unsettled"] = tuple(convention.get("unsettled", ()))
        info = HeadsInfo(
            base_name=raw["base"]["name"],
            base_fingerprint=raw["base"]["fingerprint"],
            convention=HeadConvention(**convention),
            blocks=list(heads["blocks"]),
            model_config=dict(heads.get("model_config", {})),
            drafts=int(heads.get("drafts", 0)) or int(heads["count"]),
            source=dict(raw.get("source", {})),
            training=dict(raw.get("training", {})),
            acceptance=list(raw.get("acceptance", [])),
            measurements=dict(raw.get("measurements", {})),
            count=int(heads["count"]),
        )
        if info.convention.kind != "medusa" and len(info.blocks) != heads["count"]:
            raise ValueError(f"{heads['count']} heads, but {len(info.blocks)} blocks")
        _check_types(info)
        return info
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise MTPError(f"{path} is damaged: {error}") from error


def _check_types(info: HeadsInfo) -> None:
    """Raises ValueError for what reading alone does not find: the rest of the package takes these for granted."""
    if not 1 <= info.count <= MOST_HEADS or not 1 <= info.drafts <= MOST_HEADS:
        raise ValueError(
            f"{info.count} heads that draft {info.drafts} tokens in a step: 1 to {MOST_HEADS} of each can be"
        )
    if not isinstance(info.base_name, str) or not isinstance(info.base_fingerprint, str | None):
        raise ValueError("the base's name or fingerprint is no text")
    if not all(isinstance(block, dict) for block in info.blocks):
        raise ValueError("a head's block is no description")
    if not all(isinstance(value, int | float) for value in info.acceptance):
        raise ValueError("acceptance is not made of numbers")
    plain = HeadConvention("")
    odd = [
        f.name
        for f in _fields(info)
        if type(getattr(info.convention, f.name)) is not type(getattr(plain, f.name))
    ]
    if odd:
        raise ValueError(f"the convention's {odd[0]} is {getattr(info.convention, odd[0])!r}")


def load_heads(folder: Path, model: nn.Module) -> tuple[DraftHeads, HeadsInfo]:
    """Reads heads for a bare `model` (not yet attached), in the types they are stored in.

    Raises:
        MTPError: no heads there, of another base, of a kind that nothing runs yet, or tensors that do not fit.
    """
    info = read_heads_info(folder)
    check_runnable(folder, info.convention)
    if info.base_fingerprint is None:
        log.warning("%s does not say which base its heads were made for: taken as they are", folder)
    else:
        check_base(folder, info.base_name, info.base_fingerprint, model)
    tensors = read_tensors(folder)
    draft_ids = tensors.pop(DRAFT_IDS, None)
    heads = build_heads(folder, info, model, tensors.keys(), draft_ids)
    own = dict(cast("list[tuple[str, mx.array]]", tree_flatten(heads.parameters())))
    check_fit(own, tensors)
    heads.update(tree_unflatten(list(tensors.items())))
    heads.eval()
    return heads, info


def save_heads(folder: Path, heads: DraftHeads, info: HeadsInfo, dtype: mx.Dtype = mx.bfloat16) -> None:
    """Writes the folder whole or not at all; weights in `dtype`.

    Raises:
        MTPError: it cannot be written.
    """
    tensors = {
        name: value.astype(dtype)
        for name, value in cast("list[tuple[str, mx.array]]", tree_flatten(heads.parameters()))
    }
    if heads.draft_ids is not None:
        tensors[DRAFT_IDS] = heads.draft_ids
    with new_folder(Path(folder)) as temporary:
        mx.save_safetensors(str(temporary / WEIGHTS_NAME), tensors, metadata={"format": "mlx"})
        (temporary / CONFIG_NAME).write_text(json.dumps(info.to_json(), indent=2) + "\n", encoding="utf-8")
        (temporary / "README.md").write_text(_card(info, tensors), encoding="utf-8")


def _card(info: HeadsInfo, tensors: dict[str, mx.array]) -> str:
    """The folder's README: base, convention, how it was trained, measured acceptance, how to use it."""
    weights = sum(value.size for name, value in tensors.items() if name != DRAFT_IDS)
    columns = len(tensors[DRAFT_IDS]) if DRAFT_IDS in tensors else "whole"
    depths = " / ".join(f"{value:.2f}" for value in info.acceptance) or "not measured"
    lines = [
        f"# MTP heads for {info.base_name}",
        "",
        f"{info.count} head(s) that draft {info.drafts} token(s) a step, trained and run by mtp-mlx.",
        "The base model's own output is unchanged: what the heads draft is verified.",
        "",
        f"- base: {info.base_name}, fingerprint `{info.base_fingerprint}`",
        f"- draft vocabulary {columns}; {weights / 1e6:.2f} M weights",
        f"- acceptance per depth on held-out text: {depths}",
        "",
        "## Convention",
        "",
        *[f"- {f.name.replace('_', ' ')}: {getattr(info.convention, f.name)}" for f in _fields(info)],
        "",
        "## Training",
        "",
        *[f"- {key}: {value}" for key, value in info.training.items()],
        "",
        "## Use",
        "",
        "```",
        f"mtp-mlx generate --model {info.base_name} --adapter . --prompt ...",
        "```",
        "",
    ]
    return "\n".join(lines)


def _fields(info: HeadsInfo) -> tuple[dataclasses.Field[Any], ...]:
    return dataclasses.fields(info.convention)
