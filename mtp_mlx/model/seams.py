"""The seams of an mlx-lm model, where attaching wraps it: each is found, or its absence is an error that names it."""

from __future__ import annotations

import inspect
from dataclasses import dataclass, field
from typing import Any

import mlx.nn as nn
from mlx.nn.layers.distributed import (
    AllToShardedLinear,
    QuantizedAllToShardedLinear,
    QuantizedShardedToAllLinear,
    ShardedToAllLinear,
)
from mlx_lm.models.cache import (
    ArraysCache,
    CacheList,
    KVCache,
    QuantizedKVCache,
    RotatingKVCache,
    make_prompt_cache,
)
from mlx_lm.tuner.dora import DoRALinear
from mlx_lm.tuner.lora import LoRALinear

from mtp_mlx.errors import MTPError
from mtp_mlx.model.state_cache import find_mixers

# A low-rank update of a mixture-of-experts router would send slot rows to experts that the base never chose. The
# experts themselves are not plain linear layers.
ROUTER_NAMES = frozenset({"gate", "router", "shared_expert_gate"})

# Layers with an update of mlx-lm's LoRA, whose `linear` is the layer itself (`mtp_mlx.lora`).
UPDATED = (LoRALinear, DoRALinear)
# Whole layers, and the parts of layers that a process has in tensor parallelism (`mtp_mlx.model.sharded`).
LINEAR = (
    *UPDATED,
    nn.Linear,
    nn.QuantizedLinear,
    AllToShardedLinear,
    QuantizedAllToShardedLinear,
    QuantizedShardedToAllLinear,
    ShardedToAllLinear,
)

# The names of the trunk and of its embedding in mlx-lm's model files.
TRUNK_NAMES = ("model", "backbone")
EMBEDDING_NAMES = ("embed_tokens", "embeddings", "word_embeddings", "tok_embeddings", "embedding")

# Where mlx-lm adds a mask of true and false to the scores as if it were one of numbers, which hides nothing.
NOT_CAUSAL = frozenset({"mlx_lm.models.phi3small"})


@dataclass
class Seams:
    """The places where an mlx-lm model can be wrapped.

    Attributes:
        trunk: the module that maps ids to hidden states (`model.model`).
        embedding_name: name of the embedding in the trunk.
        linears: {path below the trunk: layer} of all linear layers of the decoder layers except routers.
        ropes: {path below the trunk: module} of all rotary embeddings.
        mixers: {path below the trunk: module} of the modules that take a layer's cache.
    """

    trunk: nn.Module
    embedding_name: str = "embed_tokens"
    linears: dict[str, nn.Module] = field(default_factory=dict)
    ropes: dict[str, nn.Module] = field(default_factory=dict)
    mixers: dict[str, nn.Module] = field(default_factory=dict)

    @property
    def embedding(self) -> nn.Module:
        """The trunk's embedding, or the wrapper in its place."""
        return self.trunk[self.embedding_name]


def text_model(model: nn.Module) -> nn.Module:
    """The part of a model that has a trunk and a head: itself, or the language model of a multimodal one."""
    if trunk_name(model) is None and isinstance(model.get("language_model"), nn.Module):
        return model["language_model"]
    return model


def trunk_name(model: nn.Module) -> str | None:
    """The name of a text model's trunk, or None if it has none."""
    return next((name for name in TRUNK_NAMES if _is_trunk(model.get(name))), None)


def _is_trunk(module: Any) -> bool:
    return isinstance(module, nn.Module) and isinstance(module.get("layers"), list)


def find_seams(model: nn.Module) -> Seams:
    """Finds the seams of a model.

    Raises:
        MTPError: if a seam is missing that every use needs (names it).
    """
    name = getattr(model, "model_type", type(model).__name__)
    text = text_model(model)
    called = trunk_name(text)
    if called is None:
        raise MTPError(
            f"models of type '{name}' cannot be used here: mlx-lm does not build them as a list of layers that can "
            "be wrapped (no seam 'trunk'); use mlx-lm itself for them"
        )
    trunk = text[called]
    embedding = next((known for known in EMBEDDING_NAMES if known in trunk), None)
    if embedding is None:
        raise MTPError(
            f"models of type '{name}' cannot be used here: their embedding is not where other models of mlx-lm have "
            "it (no seam 'embed_tokens'); use mlx-lm itself for them"
        )
    if type(trunk).__module__ in NOT_CAUSAL:
        raise MTPError(
            f"models of type '{name}' cannot be used here: in a pass over several rows mlx-lm lets a row see those "
            "behind it (no seam 'mask'); use mlx-lm itself for them"
        )
    seams = Seams(trunk=trunk, embedding_name=embedding)
    for index, layer in enumerate(trunk.layers):
        modules = layer.named_modules()
        inner = {f"{path}.linear" for path, module in modules if isinstance(module, UPDATED)}
        for path, module in modules:
            if path not in inner:
                _classify(seams, f"layers.{index}.{path}", module)
        for path, module in find_mixers(layer).items():
            seams.mixers[f"layers.{index}.{path}".rstrip(".")] = module
    return seams


def check_slot_seams(seams: Seams, model: nn.Module) -> None:
    """Raises MTPError if the layers of `model` lack a seam that slot rows need.

    Recurrent state reads rows in their order; if the other layers have no rotary embeddings, there is nothing to
    place.
    """
    name = str(getattr(model, "model_type", "?"))
    if not seams.ropes and not is_recurrent(make_prompt_cache(model)):
        raise MTPError(f"model type '{name}' has no seam 'rope' in its layers: slot rows cannot be placed")
    elsewhere = ropes_elsewhere(seams)
    if elsewhere:
        raise MTPError(
            f"model type '{name}' has no seam 'rope' for all of its layers ({elsewhere[0]} is not in their list): "
            "slot rows cannot be placed"
        )
    if not seams.linears:
        raise MTPError(
            f"model type '{name}' has no seam 'linear' in its layers: gated LoRA has nothing to wrap"
        )


def ropes_elsewhere(seams: Seams) -> list[str]:
    """Paths of the rotary embeddings that are not in the trunk's list of layers."""
    return [path for path, _ in seams.trunk.named_modules() if _is_rope(path) and path not in seams.ropes]


def reads_places(trunk: nn.Module) -> str:
    """What a trunk does by a row's place in the pass, where positions given to its rotary embeddings do not reach.

    As the end of a sentence; "" if it does nothing so.
    """
    for layer in trunk.layers:
        if "attn_scale" in inspect.signature(type(layer).__call__).parameters:  # Ministral 3, Mistral 4
            return "scales queries by their place in a pass"
        if any(getattr(module, "is_sparse_attn", False) for module in layer.modules()):  # MiniMax M3
            return "chooses blocks of keys by their place in a pass"
    return ""


def updated_layers(model: nn.Module) -> str:
    """The layers with an update of mlx-lm's LoRA, in words: how many, and of what size; "" if there are none."""
    found = [module for _, module in model.named_modules() if isinstance(module, UPDATED)]
    size = sum(module.lora_a.size + module.lora_b.size for module in found)
    return f"{len(found)} layers, {size} weights" if found else ""


def is_recurrent(caches: list) -> bool:
    """Whether some layer has recurrent state."""
    return any(isinstance(leaf, ArraysCache) for _, leaf in cache_leaves(caches))


def cache_leaves(caches: list) -> list[tuple[int, Any]]:
    """(layer index, cache) of every cache; a layer may have several."""
    return [
        (index, leaf)
        for index, cache in enumerate(caches)
        for leaf in (cache.caches if isinstance(cache, CacheList) else (cache,))
    ]


def _is_rope(path: str) -> bool:
    return path.rsplit(".", 1)[-1].endswith("rope")


def _classify(seams: Seams, path: str, module: nn.Module) -> None:
    last = path.rsplit(".", 1)[-1]
    if isinstance(module, LINEAR):
        if last not in ROUTER_NAMES:
            seams.linears[path] = module
    elif _is_rope(path):
        if type(module).__name__ == "DynamicNTKScalingRoPE":
            raise MTPError(
                "this model's seam 'rope' is DynamicNTKScalingRoPE, whose angles depend on the number of rows in a "
                "call: rows with explicit positions would differ from plain decoding"
            )
        seams.ropes[path] = module


def check_caches(caches: list, model_name: str) -> None:
    """Checks that every cache can be rolled back.

    Raises:
        MTPError: if the type or state of a layer's cache does not allow it (names the layer).
    """
    for index, cache in cache_leaves(caches):
        kind = type(cache)
        where = f"model type '{model_name}' has no seam 'cache' in layer {index}: its {kind.__name__} "
        if kind not in (KVCache, QuantizedKVCache, RotatingKVCache, ArraysCache):
            raise MTPError(
                where + "cannot be rolled back after a rejected draft; key-value caches, sliding windows and "
                "recurrent state can"
            )
        if kind is ArraysCache and (cache.lengths is not None or cache.left_padding is not None):
            raise MTPError(
                where
                + "belongs to a padded batch and cannot be rolled back after a rejected draft: extract the "
                "single sequence"
            )


def module_at(root: nn.Module, path: str) -> nn.Module:
    """The module at dotted `path` below `root`."""
    found: Any = root
    for part in path.split("."):
        found = found[int(part)] if isinstance(found, list) else found[part]
    return found


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


def embedding_rows(model: nn.Module) -> int | None:
    """V, the rows of a model's embedding; None if the embedding is not where mlx-lm's models have it."""
    text = text_model(model)
    trunk = text.get(trunk_name(text) or "")
    embedding = next((trunk[name] for name in EMBEDDING_NAMES if name in trunk), None) if trunk else None
    return None if embedding is None else embedding_shape(embedding)[0]


def embedding_shape(embed_tokens: nn.Module) -> tuple[int, int]:
    """(V, D) of an embedding layer, quantised or not."""
    if isinstance(embed_tokens, nn.QuantizedEmbedding):
        return int(embed_tokens.num_embeddings), int(embed_tokens.dims)
    rows, size = embed_tokens.weight.shape
    return int(rows), int(size)
