"""What a case of `head_cases` says, and the names that several families share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

Arrays = dict[str, np.ndarray]


@dataclass
class Case:
    """How a family stores its heads.

    layer: (module of mlx_lm.models, class, class of its arguments, arguments by name for head i).
    names: stored name of fuse, norm_embedding, norm_hidden, norm_out; block: prefix; {n} = L + i or i.
    past_trunk: {n} counts on from the trunk's layers. rename: stored name of a block's tensor.
    """

    family: str
    config: dict[str, Any]
    layer: tuple[str, str, str, Callable[[int], dict[str, Any]]]
    names: dict[str, str]
    block: str
    heads: int = 1
    past_trunk: bool = False
    order: str = "embedding"
    zero_centred: bool = False
    rename: dict[str, str] = field(default_factory=dict)
    copies: dict[str, str] = field(default_factory=dict)  # stored name -> the trunk's tensor it repeats
    own: dict[str, str] = field(default_factory=dict)  # canonical part -> stored name
    trunk: Arrays = field(default_factory=dict)
    fused_experts: bool = False
    stacked_as: str = ""  # experts are stored stacked, under this name
    layer_config: dict[str, Any] = field(default_factory=dict)
    scales: dict[str, float] = field(default_factory=dict)  # factor that the converter multiplies in


CONV = {"model.layers.0.linear_attn.conv1d.weight": np.ones((8, 1, 4), np.float32)}
FC = {
    "fuse": "mtp.fc",
    "norm_embedding": "mtp.pre_fc_norm_embedding",
    "norm_hidden": "mtp.pre_fc_norm_hidden",
    "norm_out": "mtp.norm",
}
NEXTN = {
    "fuse": "model.layers.{n}.eh_proj",
    "norm_embedding": "model.layers.{n}.enorm",
    "norm_hidden": "model.layers.{n}.hnorm",
    "norm_out": "model.layers.{n}.shared_head.norm",
}
LING_NAMES = NEXTN | {"norm_out": "model.layers.{n}.final_layernorm"}
NEXTN_COPIES = {
    "model.layers.{n}.embed_tokens.weight": "model.embed_tokens.weight",
    "model.layers.{n}.shared_head.head.weight": "lm_head.weight",
}


def under(prefix: str, fuse: str, embedding: str, hidden: str, out: str) -> dict[str, str]:
    """Names of the four tensors under one prefix."""
    parts = {"fuse": fuse, "norm_embedding": embedding, "norm_hidden": hidden, "norm_out": out}
    return {key: f"{prefix}{value}" for key, value in parts.items() if value}


MIMO_NAMES = ("input_proj", "token_layernorm", "hidden_layernorm", "final_layernorm")
