"""The part of the target that an assistant reads: which layers' caches, and the scale of the embedding."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import mlx.nn as nn

from mtp_mlx.drafters.gemma4_assistant.config import AssistantConfig
from mtp_mlx.errors import MTPError
from mtp_mlx.model.seams import embedding_shape, find_seams


@dataclass(frozen=True)
class ReadTarget:
    """What is read of a model.

    Attributes:
        layers: {kind of layer: index of the cache that is read}: of the last layer of that kind with keys of its own.
        scale: factor of the embedding.
    """

    layers: dict[str, int]
    scale: float


def read_target(config: AssistantConfig, model: nn.Module) -> ReadTarget:
    """What an assistant reads of a bare model.

    Raises:
        MTPError: if the assistant was not made for a model like this: another family, width, vocabulary, or heads.
    """
    seams = find_seams(model)
    trunk: Any = seams.trunk
    owners = getattr(trunk, "previous_kvs", None)  # of each layer, the layer whose keys it reads
    kinds = [getattr(layer, "layer_type", None) for layer in trunk.layers]
    if owners is None or not all(kinds):
        kind = getattr(model, "model_type", type(model).__name__)
        raise MTPError(
            f"a Gemma 4 assistant drafts for a Gemma 4 model only, and this one is of the type '{kind}': leave "
            "`heads` out, or name heads of this model"
        )
    vocabulary, width = embedding_shape(seams.embedding)
    other = "name the assistant that was made for this model"
    if config.backbone_hidden_size != width:
        raise MTPError(
            f"this assistant is for a model of width {config.backbone_hidden_size}, and this model's is {width}: "
            f"{other}"
        )
    if config.text_config["vocab_size"] != vocabulary:
        raise MTPError(
            f"this assistant knows {config.text_config['vocab_size']} tokens, and this model {vocabulary}: {other}"
        )
    layers = {}
    for kind in sorted(set(config.kinds)):
        own = [i for i, of in enumerate(kinds) if of == kind and owners[i] == i]
        if not own:
            raise MTPError(
                f"this assistant reads keys of {kind}, and no layer of this model has any: {other}"
            )
        layers[kind] = own[-1]
        _check_heads(config, kind, trunk.layers[own[-1]].self_attn, other)
    return ReadTarget(layers, float(trunk.embed_scale))


def _check_heads(config: AssistantConfig, kind: str, attention: Any, other: str) -> None:
    """Raises MTPError if queries of the assistant do not go with the keys of the target's layer."""
    heads, width = int(config.text_config["num_attention_heads"]), config.head_dim(kind)
    if width != attention.head_dim or heads % attention.n_kv_heads:
        raise MTPError(
            f"this assistant has {heads} heads of {width} numbers for {kind}, which do not go with this model's "
            f"{attention.n_kv_heads} of {attention.head_dim}: {other}"
        )
