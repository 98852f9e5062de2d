"""Writes heads of a checkpoint or an adapter folder in the "speculators mtp" layout, which other runtimes read.

    mtp_layers.{i}.{input_proj, token_layernorm, hidden_layernorm, final_layernorm, <layer>}    model.safetensors
    transformer_layer_config (the language model's configuration), speculators_config           config.json

The layout is embedding-first; norms are stored as the model stores them (around zero for Qwen3-Next); experts are
fused to [E, 2F, D] and [E, D, F]; embedding and LM head are the base model's. So only order and names change.
The rest of a convention (which states heads take, whether position 0 is masked) has no place in this layout: it is
written under a key of our own, which `convert` reads and other runtimes ignore.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from mtp_mlx.adapter_folder import WEIGHTS_NAME
from mtp_mlx.convert.heads.families import CONVENTION_FIELDS, CONVENTION_KEY
from mtp_mlx.convert.heads.targets import (
    ADD_ONE,
    AS_IT_IS,
    Block,
    HeadPlan,
    Step,
    Target,
    save_targets,
)
from mtp_mlx.convert.read.checkpoint import Checkpoint
from mtp_mlx.convert.read.safetensors import read_safetensors
from mtp_mlx.errors import ConversionError
from mtp_mlx.files import check_out, new_folder

# Modules of mlx-lm whose layer has the names of the original model, apart from its experts.
_SAME_NAMES = ("llama", "qwen2", "qwen3", "mimo", "qwen3_next", "qwen3_5")
_TAKE_ONE = Step("1 taken off", values=lambda norm: norm - np.float32(1))
_NAMES = {
    "fuse": "input_proj",
    "norm_embedding": "token_layernorm",
    "norm_hidden": "hidden_layernorm",
    "norm_out": "final_layernorm",
}


def write_speculators(
    checkpoint: Checkpoint, plan: HeadPlan, out: str | Path, *, base_name: str = "", force: bool = False
) -> Path:
    """Write the heads of `checkpoint` into the folder `out`.

    Args:
        plan: of the heads, by `plan_heads`.
        base_name: of the base model, for config.json; by default the checkpoint's own name.
        force: replace `out` if it is a model folder already.

    Raises MTPError: `out` exists, or heads that the layout cannot hold.
    """
    out = Path(out)
    check_out(out, force=force, mark="config.json", kind="a model folder", source=checkpoint.path)
    return _write(checkpoint, _as_modelled(plan), out, base_name)


def _as_modelled(plan: HeadPlan) -> HeadPlan:
    """`plan` with norms as the model stores them, even if an earlier conversion added 1 to those in the file."""
    if not _zero_centred(plan.model_config):
        return plan
    took = {ADD_ONE: AS_IT_IS, AS_IT_IS: _TAKE_ONE}
    targets = [
        replace(target, step=took.get(target.step, target.step))
        if len(target.shape) == 1 and _is_norm(target.name)
        else target
        for target in plan.targets
    ]
    return replace(plan, targets=targets)


def _zero_centred(config: dict[str, Any]) -> bool:
    """Whether a model of the layout stores its norms around zero."""
    return str(config.get("model_type")).startswith(("qwen3_next", "qwen3_5"))


def export_speculators(
    folder: str | Path,
    out: str | Path,
    *,
    base_name: str = "",
    base: dict[str, Any] | None = None,
    force: bool = False,
) -> Path:
    """Write the heads of the adapter folder `folder` into the folder `out`.

    Args:
        base_name: of the base model, for config.json; by default what the adapter folder calls it.
        base: the base model's config.json, needed for heads that were trained here.
        force: replace `out` if it is a model folder already.

    Raises MTPError: as `write_speculators`, or no base configuration where one is needed.
    """
    out = Path(out)
    check_out(out, force=force, mark="config.json", kind="a model folder", source=folder)
    checkpoint, plan, name = _adapter_plan(Path(folder), base)
    return _write(checkpoint, plan, out, base_name or name)


def _adapter_plan(folder: Path, base: dict[str, Any] | None) -> tuple[Checkpoint, HeadPlan, str]:
    """The tensors of an adapter folder, the plan for the layout, and the base's name."""
    from mlx_lm.utils import _get_classes

    from mtp_mlx.adapter_folder import DRAFT_IDS, read_header
    from mtp_mlx.drafters.heads.build import LAST_LAYERS
    from mtp_mlx.drafters.heads.folder import LAST_LAYER, config_of

    header = read_header(folder)
    heads = config_of(folder, header)
    if any(spec == {"like": LAST_LAYERS, "layers": 1} for spec in heads.blocks):
        raise ConversionError(
            f"{folder}: its heads are copies of another layer than the last, for which this layout has no place"
        )
    if heads.taps or any(spec.get("like") == LAST_LAYERS for spec in heads.blocks):
        raise ConversionError(
            f"{folder}: this layout has no place for heads of several layers, or that read several states of the base"
        )
    if heads.quantization:
        raise ConversionError(
            f"{folder}: its heads are stored in {heads.quantization['bits']} bits, for which this layout has no "
            "place: train with `store` bf16"
        )
    config = base or heads.model_config
    if not config:
        raise ConversionError(
            f"{folder}: its heads were made of their base's last layer, whose configuration is not in the folder; "
            "give `base`, the base model"
        )
    modules = []
    for spec in heads.blocks:
        try:
            found = _get_classes(config)[0].__module__ if spec == LAST_LAYER else str(spec["module"])
        except (KeyError, ValueError) as error:
            raise ConversionError(
                f"{folder}: mlx-lm does not know the model of its heads ({error})"
            ) from error
        modules.append(found.rsplit(".", 1)[-1])
    if isinstance(config.get("text_config"), dict):
        config = {**config, **config["text_config"]}
    tensors = {
        name: tensor for name, tensor in read_safetensors(folder / WEIGHTS_NAME).items() if name != DRAFT_IDS
    }
    # The layout keeps norms as the model stores them, the adapter as plain gains.
    zero_centred = _zero_centred(config)
    targets = [
        Target(
            name,
            tensor.shape,
            ((name, tensor.shape),),
            _TAKE_ONE if zero_centred and _is_norm(name) else AS_IT_IS,
        )
        for name, tensor in tensors.items()
    ]
    blocks = [Block(module, "", "", (), {}, ()) for module in modules]
    plan = HeadPlan(
        heads.convention.family, heads.convention, len(heads.blocks), targets, blocks, model_config=config
    )
    return Checkpoint(folder, "safetensors", tensors, config), plan, header.base_name


def _is_norm(name: str) -> bool:
    return "norm" in name.rsplit(".", 2)[-2]


def _write(checkpoint: Checkpoint, plan: HeadPlan, out: Path, base_name: str) -> Path:
    targets = speculators_targets(checkpoint, plan)
    with new_folder(out) as folder:
        save_targets(folder / "model.safetensors", targets, checkpoint.tensors)
        text = json.dumps(_config(checkpoint, plan, base_name or checkpoint.path.resolve().name), indent=2)
        (folder / "config.json").write_text(text + "\n", encoding="utf-8")
    return out


def speculators_targets(checkpoint: Checkpoint, plan: HeadPlan) -> list[Target]:
    """The tensors of the layout; `plan` must leave norms as the model stores them.

    Raises ConversionError: heads of another form, or with an embedding or LM head of their own.
    """
    convention = plan.convention
    modules = {block.module for block in plan.blocks}
    if convention.kind != "cascade" or not modules <= set(_SAME_NAMES) or convention.output_norm != "own":
        raise ConversionError(
            f"{checkpoint.path}: the speculators layout is for heads of the form of Qwen, Llama and MiMo-7B, not of "
            f"{plan.title}"
        )
    if "own" in (convention.embedding, convention.lm_head):
        raise ConversionError(
            f"{checkpoint.path}: these heads have their own embedding or LM head, for which the speculators layout "
            "has no place"
        )
    if any(target.name.endswith(".scales") for target in plan.targets):
        raise ConversionError(
            f"{checkpoint.path}: these heads are quantised, for which the speculators layout has no place"
        )
    by_name = {target.name: target for target in plan.targets}
    targets = []
    for name, target in by_name.items():
        _, i, part, rest = name.split(".", 3)
        if part in _NAMES:
            targets.append(_named(target, f"mtp_layers.{i}.{_NAMES[part]}.{rest}"))
        elif ".switch_mlp." not in name:
            targets.append(_named(target, f"mtp_layers.{i}.{rest}"))
        elif rest == "mlp.switch_mlp.gate_proj.weight":
            up = by_name[name.replace("gate_proj", "up_proj")]
            targets.append(_fused(target, up, f"mtp_layers.{i}.mlp.experts.gate_up_proj"))
        elif rest == "mlp.switch_mlp.down_proj.weight":
            targets.append(_named(target, f"mtp_layers.{i}.mlp.experts.down_proj"))
    return targets


def _named(target: Target, name: str) -> Target:
    return Target(name, target.shape, target.sources, target.step)


def _fused(gate: Target, up: Target, name: str) -> Target:
    """Gate and up projections of all experts in one tensor [E, 2F, D]."""
    count, width, hidden = gate.shape
    shape = (count, 2 * width, hidden)
    if gate.sources == up.sources:  # fused in the file already
        return Target(name, shape, gate.sources, AS_IT_IS)
    stacked = len(gate.sources)

    def both(arrays: Sequence[np.ndarray]) -> np.ndarray:
        parts = [np.stack(arrays[:stacked]), np.stack(arrays[stacked:])]
        return np.concatenate([part.reshape(gate.shape) for part in parts], axis=1)

    return Target(name, shape, gate.sources + up.sources, Step("gate and up of all experts fused", bits=both))


def _config(checkpoint: Checkpoint, plan: HeadPlan, base_name: str) -> dict[str, Any]:
    return {
        "architectures": ["MTPDraftModel"],
        "speculators_model_type": "mtp",
        "speculators_config": {
            "algorithm": "mtp",
            "default_proposal_method": "greedy",
            "proposal_methods": [
                {"proposal_type": "greedy", "speculative_tokens": plan.drafts or plan.count}
            ],
            "verifier": {
                "name_or_path": base_name,
                "architectures": checkpoint.config.get("architectures", []),
            },
        },
        "transformer_layer_config": plan.model_config,
        CONVENTION_KEY: {name: getattr(plan.convention, name) for name in CONVENTION_FIELDS},
    }
