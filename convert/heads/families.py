"""Recognises the family of a checkpoint's cascade heads by tensor names and config.json, and maps their tensors."""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass, field, replace
from typing import Any

from mtp_mlx.convert.heads.blocks import BLOCKS, nemotron_pattern
from mtp_mlx.convert.heads.family_table import FAMILIES, REFUSED, Family
from mtp_mlx.convert.heads.parts import Stored
from mtp_mlx.convert.heads.targets import ADD_ONE, AS_IT_IS, SWAP, Block, Step, Target
from mtp_mlx.drafters.heads.convention import HeadConvention
from mtp_mlx.errors import ConversionError

# Fields of `HeadConvention` that the speculators layout has no place for, and the key our export writes them under.
CONVENTION_KEY = "mtp_mlx_convention"
CONVENTION_FIELDS = {
    "first_hidden": ("post-norm", "pre-norm"),
    "recycled_hidden": ("normed", "raw", "trunk"),
    "mask_first_position": (False, True),
}
# One of these is in every Gemma 4 assistant, which `mtp_mlx.convert.adapters.gemma4_assistant` reads.
ASSISTANT = ("pre_projection.weight", "post_projection.weight")
# Multi-modal checkpoints put this before the language model's names.
_ROOT = r"(?:(?:model\.)?language_model\.)?"


@dataclass
class Found:
    """A checkpoint's heads, recognised but not yet checked against its tensors.

    Attributes:
        title: of their family.
        targets: the canonical tensors of all heads, without embeddings and LM heads.
        blocks: one for each head; empty for Medusa.
        owned: names of the stored tensors that belong to heads.
        config: the language model's configuration.
        copies: (canonical name, stored name, "embed_tokens" or "lm_head") of what may be stored besides.
        count: number of heads.
        drafts: tokens the heads were trained to draft in a step; 0 for one each.
    """

    title: str
    convention: HeadConvention
    targets: list[Target]
    blocks: list[Block]
    owned: set[str]
    config: dict[str, Any]
    copies: list[tuple[str, str, str]] = field(default_factory=list)
    count: int = 0
    drafts: int = 0


def find_cascade(names: Collection[str], config: dict[str, Any]) -> Found | None:
    """The heads of one of FAMILIES in a checkpoint with these tensors and this configuration, or None.

    Raises ConversionError: a known layout of an unsupported model type, or heads that are refused by name.
    """
    written = config.get(CONVENTION_KEY)  # by our own export
    speculators = config.get("speculators_config")
    inner = config.get("transformer_layer_config")  # speculators keep the model's configuration here
    config = _of_trunk(inner if isinstance(inner, dict) else config)
    kind = config.get("model_type")
    layouts = [family for family in FAMILIES if _root(family, names, config) is not None]
    for family in layouts:
        if kind in (family.model_types or tuple(BLOCKS)):
            found = _found(family, names, config)
            if found.convention.family == "speculators" and isinstance(speculators, dict):
                drafts = _speculative_tokens(speculators)
                found.drafts = drafts if drafts >= found.count else 0
            if found.convention.family == "speculators" and isinstance(written, dict):
                return _as_written(found, written)
            return found
    if layouts:
        known = sorted({kind for family in layouts for kind in family.model_types or BLOCKS})
        raise ConversionError(
            f"the heads' tensors have names like {layouts[0].names.fuse}, but model_type in config.json is {kind!r}; "
            f"with these names it must be one of {', '.join(known)}"
        )
    if any(name in names for name in ASSISTANT):
        raise ConversionError(
            "these are the tensors of a Gemma 4 assistant, which drafts as it is: name its folder, with its "
            "config.json, with `heads`, and its model with `model`"
        )
    for pattern, title in REFUSED.items():
        if any(re.match(_ROOT + pattern, name) for name in names):
            raise ConversionError(
                f"the heads are {title}, which is not supported; docs/checkpoints.md lists those that are"
            )
    return None


def _of_trunk(config: dict[str, Any]) -> dict[str, Any]:
    """The configuration, with the trunk's model type where it is that of heads alone ("qwen3_5_mtp")."""
    kind = config.get("model_type")
    return {**config, "model_type": kind.removesuffix("_mtp")} if isinstance(kind, str) else config


def _root(family: Family, names: Collection[str], config: dict[str, Any]) -> str | None:
    """The prefix of the family's names ("" or "language_model."), or None if it is another family."""
    if family.setting and config.get(family.setting) is None:
        return None
    marker = re.compile(f"({_ROOT}){family.marker}")
    trunk = int(config.get("num_hidden_layers") or 0) if family.past_trunk else 0
    for name in names:
        match = marker.match(name)
        if match and (not family.past_trunk or int(match[2]) >= trunk):
            return match[1]
    return None


def _found(family: Family, names: Collection[str], config: dict[str, Any]) -> Found:
    root = _root(family, names, config) or ""
    layers = sorted(
        {int(m[1]) for m in (re.fullmatch(re.escape(root) + family.layers, name) for name in names) if m}
    )
    _check_numbers(family, layers, config)
    convention = family.convention
    if family.as_modelled:
        zero_centred = config["model_type"].startswith(("qwen3_next", "qwen3_5"))
        convention = replace(convention, zero_centred_norms=zero_centred)
    drafts = int(config.get(family.drafts) or 0) if family.drafts else 0
    found = Found(family.title, convention, [], [], set(), config, drafts=drafts)
    for i, n in enumerate(layers or [0]):
        z = n + len(nemotron_pattern(config)) - 1 if "{z}" in family.names.norm_out else n
        stored = {
            key: root + value.format(i=i, n=n, z=z) for key, value in vars(family.names).items() if value
        }
        where = Stored(config, names, stored["block"], i, n)
        block = BLOCKS[config["model_type"]](where)
        found.blocks.append(block)
        found.targets += _head(i, where.hidden, stored, block, convention)
        for part in ("embed_tokens", "lm_head"):
            if part in stored:
                found.copies.append((f"heads.{i}.{part}.weight", stored[part], part))
        found.owned |= {name for name in names if name.startswith(root + family.owned.format(n=n))}
    if family.unused:
        found.owned = {name for name in found.owned if not re.search(f"{family.unused}$", name)}
    found.count = len(found.blocks)
    return found


def _speculative_tokens(speculators: dict[str, Any]) -> int:
    """How many tokens a speculators folder was trained to draft in a step; 0 if it does not say."""
    methods = speculators.get("proposal_methods")
    first = methods[0] if isinstance(methods, list) and methods else None
    tokens = first.get("speculative_tokens") if isinstance(first, dict) else None
    return tokens if isinstance(tokens, int) and tokens > 0 else 0


def _check_numbers(family: Family, layers: list[int], config: dict[str, Any]) -> None:
    """Raises ConversionError if a head is missing between others: those behind it would draft in its place."""
    if "{z}" in family.names.norm_out or not layers:  # several layers each, or one that is not numbered
        return
    first = int(config.get("num_hidden_layers") or layers[0]) if family.past_trunk else 0
    lost = [n for n, found in zip(range(first, first + len(layers)), layers, strict=True) if n != found]
    if lost:
        raise ConversionError(
            f"there are MTP heads at layers {', '.join(map(str, layers))}, but that at layer {lost[0]} is missing or "
            f"incomplete ({family.title}); get the whole checkpoint"
        )


def _as_written(found: Found, written: dict[str, Any]) -> Found:
    """`found` with the fields that our export wrote into config.json.

    Raises ConversionError: an unknown field or value.
    """
    for name, value in written.items():
        if value not in CONVENTION_FIELDS.get(name, ()):
            raise ConversionError(f"config.json: {CONVENTION_KEY} has {name} {value!r}, which is not known")
    return replace(found, convention=replace(found.convention, **written))


def _head(
    i: int, width: int, stored: dict[str, str], block: Block, convention: HeadConvention
) -> list[Target]:
    """The canonical tensors of head i."""
    norm = ADD_ONE if convention.zero_centred_norms else AS_IT_IS

    def own(name: str, shape: tuple[int, ...], step: Step) -> Target:
        return Target(f"heads.{i}.{name}.weight", shape, ((stored[name], shape),), step)

    targets = [
        own("fuse", (width, 2 * width), SWAP if convention.stored_order == "hidden" else AS_IT_IS),
        own("norm_embedding", (width,), norm),
        own("norm_hidden", (width,), norm),
    ]
    for target in block.targets:
        step = norm if _is_norm(target) else target.step
        targets.append(replace(target, name=f"heads.{i}.block.{target.name}", step=step))
    return targets + [own("norm_out", (width,), norm)] if "norm_out" in stored else targets


def _is_norm(target: Target) -> bool:
    """Whether a block's tensor is a norm that is stored as the convention says (norms with a scale are plain)."""
    return len(target.shape) == 1 and target.name.endswith("norm.weight") and target.step is AS_IT_IS
