"""Whole tiny checkpoints, trunk and MTP heads, under PyTorch's names and with numbers that a model could have.

Names and shapes of heads come from `head_checkpoints`, those of the trunk from mlx-lm's model, put back into the
form in which checkpoints are released. Numbers are drawn by name, so that activations stay of the order of one.
"""

from __future__ import annotations

import re
import zlib
from dataclasses import replace
from typing import Any

import numpy as np
from mlx.utils import tree_flatten
from mlx_lm.utils import _get_classes

from tests.convert.heads.head_cases import CASES, Arrays, Case
from tests.convert.heads.head_checkpoints import Made, make, model_config, store_block

# Norms that are stored around zero where a family does so; those of linear attention are not.
_ZERO_CENTRED = re.compile(r"(layernorm|(?<!linear_attn\.)norm|pre_fc_norm_\w+|enorm|hnorm)\.weight$")


def parity_checkpoint(name: str, settings: dict[str, Any]) -> Made:
    """The checkpoint of a case; `settings` are added to the language model's configuration."""
    case = CASES[name]
    made = make(name)
    config = model_config(case) | settings
    nested = next((key for key in ("text_config", "transformer_layer_config") if key in case.config), None)
    made.config = {**case.config, nested: config} if nested else config
    stand_ins = {"model.embed_tokens.weight", "model.word_embeddings.weight", "model.norm.weight"}
    stand_ins |= {"lm_head.weight", *case.trunk}
    heads = {key: value for key, value in made.stored.items() if key not in stand_ins}
    shapes = heads | trunk_arrays(case, trunk_config(made))
    copied = {key.format(n=n): trunk for key, trunk in case.copies.items() for n in range(9)}
    zero_centred = case.zero_centred
    made.stored = {key: drawn(key, value.shape, zero_centred) for key, value in shapes.items()}
    for key in made.stored.keys() & copied.keys():
        made.stored[key] = made.stored[copied[key]].copy()
    return made


def trunk_config(made: Made) -> dict[str, Any]:
    """The trunk's config.json."""
    return made.config.get("transformer_layer_config") or made.config


def trunk_arrays(case: Case, config: dict[str, Any]) -> Arrays:
    """The trunk's tensors under their released names; only shapes matter."""
    model_class, args_class = _get_classes(config)
    model = model_class(args_class.from_dict(config))
    layers: dict[str, Arrays] = {}
    for name, value in tree_flatten(model.parameters()):
        match = re.fullmatch(r"(.*layers\.\d+\.)(.*)", name)
        prefix, rest = (match[1], match[2]) if match else ("", name)
        layers.setdefault(prefix, {})[rest] = np.zeros(value.shape, np.float32)
    here = replace(
        case,
        rename=_trunk_names(case),
        stacked_as="moe" if case.family == "step-3.5" else "",
        fused_experts=case.fused_experts and case.family != "speculators",
    )
    stored: Arrays = {}
    for prefix, block in layers.items():
        for name, value in store_block(here, block).items():
            key = prefix + name
            if case.family != "kimi-k3":
                key = key.replace("language_model.model.", "model.language_model.")
            key = key.removeprefix("language_model.")
            stored[key] = value.transpose(0, 2, 1) if name.endswith("conv1d.weight") else value
    return stored


def _trunk_names(case: Case) -> dict[str, str]:
    """Renames of a head's block that trunks have too."""
    if case.family in ("mimo-v2", "longcat-flash"):
        return {}
    if case.family == "step-3.5":
        return CASES["step-3.5 experts"].rename
    return case.rename


def drawn(name: str, shape: tuple[int, ...], zero_centred: bool = False) -> np.ndarray:
    """Random float32 numbers, the same for the same name."""
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    noise = rng.normal(size=shape)
    if name.endswith("A_log"):
        noise = np.log(rng.uniform(1, 4, shape))
    elif len(shape) > 1:
        noise = noise if "embed" in name else 1.4 * noise / shape[-1] ** 0.5
    elif "norm" in name:
        noise = 0.3 * noise + (0 if zero_centred and _ZERO_CENTRED.search(name) else 1)
    else:
        noise = 0.3 * noise
    return noise.astype(np.float32)
