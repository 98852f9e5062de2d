"""The four seams of an mlx-lm model that attaching touches, found or refused by name (design 2.1)."""

from __future__ import annotations

from dataclasses import dataclass, field

import mlx.nn as nn

from mtp_mlx.errors import MTPError

# Routers of mixture-of-experts layers decide, they do not transform: a low-rank update there would
# send slot rows to experts the base never chose. Experts themselves are no plain linear layers.
ROUTER_NAMES = frozenset({"gate", "router", "shared_expert_gate"})


@dataclass
class Seams:
    """Where an mlx-lm model can be wrapped.

    Attributes:
        trunk: the module that maps ids to hidden states (`model.model`).
        linears: {path below the trunk: layer} of every linear layer of the decoder layers.
        ropes: {path below the trunk: module} of every rotary embedding.
    """

    trunk: nn.Module
    linears: dict[str, nn.Module] = field(default_factory=dict)
    ropes: dict[str, nn.Module] = field(default_factory=dict)


def find_seams(model: nn.Module) -> Seams:
    """Finds the seams.

    Raises:
        MTPError: a seam is missing; the message names it.
    """
    name = getattr(model, "model_type", type(model).__name__)
    trunk = getattr(model, "model", None)
    if trunk is None or not hasattr(trunk, "layers"):
        raise MTPError(
            f"model type '{name}' has no seam 'trunk' (model.model with .layers): it cannot be wrapped"
        )
    if not hasattr(trunk, "embed_tokens"):
        raise MTPError(
            f"model type '{name}' has no seam 'embed_tokens' in its trunk: slots cannot be embedded"
        )
    seams = Seams(trunk=trunk)
    for index, layer in enumerate(trunk.layers):
        for path, module in layer.named_modules():
            _classify(seams, f"layers.{index}.{path}", module)
    if not seams.ropes:
        raise MTPError(f"model type '{name}' has no seam 'rope' in its layers: slot rows cannot be placed")
    if not seams.linears:
        raise MTPError(
            f"model type '{name}' has no seam 'linear' in its layers: gated LoRA has nothing to wrap"
        )
    return seams


def _classify(seams: Seams, path: str, module: nn.Module) -> None:
    last = path.rsplit(".", 1)[-1]
    if isinstance(module, nn.Linear | nn.QuantizedLinear):
        if last not in ROUTER_NAMES:
            seams.linears[path] = module
    elif last == "rope":
        if type(module).__name__ == "DynamicNTKScalingRoPE":
            raise MTPError(
                "this model's seam 'rope' is DynamicNTKScalingRoPE, whose angles depend on the length of the "
                "call: rows with explicit positions would differ from plain decoding"
            )
        seams.ropes[path] = module


def check_caches(caches: list, model_name: str) -> None:
    """Refuses cache types whose rows cannot be taken back.

    Raises:
        MTPError: a layer's cache is recurrent or rotating; the message names the type.
    """
    for index, cache in enumerate(caches):
        kind = type(cache).__name__
        if kind not in ("KVCache", "QuantizedKVCache"):
            raise MTPError(
                f"model type '{model_name}' has no seam 'cache' in layer {index}: its {kind} cannot give rejected "
                "drafts back; only ordinary KV caches can"
            )


def replace_module(root: nn.Module, path: str, module: nn.Module) -> None:
    """Puts `module` at dotted `path` below `root`."""
    *parents, last = path.split(".")
    owner = root
    for part in parents:
        owner = owner[int(part)] if isinstance(owner, list) else owner[part]
    if isinstance(owner, list):
        owner[int(last)] = module
    else:
        owner[last] = module
