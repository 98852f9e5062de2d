"""Tiny whole checkpoints: a trunk under its family's own names, written from what mlx-lm's model needs, and heads.

`whole(name)` is `head_checkpoints.make(name)` with the tensors of a whole trunk. All numbers are multiples of 1/64.
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from mlx.utils import tree_flatten
from mlx_lm.utils import _get_classes

from tests.convert.heads.head_cases import CASES, Arrays
from tests.convert.heads.head_checkpoints import EMBEDDINGS, Made, make, numbers, store_block
from tests.tiny import hf_tokenizer

TOKENS = 157
# What mlx-lm's trunk needs to know beyond what the heads do.
SETTINGS: dict[str, dict[str, Any]] = {
    "longcat-flash": {
        "attention_method": "MLA",
        "zero_expert_type": "identity",
        "moe_topk": 2,
        "zero_expert_num": 1,
        "routed_scaling_factor": 1.0,
    },
    "ernie-4.5": {"moe_layer_start_index": 9},  # mlx-lm stacks no biases of experts
}
# Norms that are stored around zero where a family does that; the norm of linear attention is not.
SHIFTED = ("input_layernorm", "post_attention_layernorm", "q_norm", "k_norm")
# The trunk's tensors that `make` writes for heads to be copies of.
ALONE = ("lm_head.weight", *(f"{name}.weight" for name in ("model.embed_tokens", *EMBEDDINGS.values())))
STEP = {
    ".mlp.switch_mlp.": ".moe.",
    ".mlp.gate.gate.": ".moe.gate.",
    ".mlp.gate.router_bias": ".moe.router_bias",
    ".mlp.share_expert.": ".share_expert.",
}
# transformers refuses the configuration of the one, so its tokenizer loads nowhere; mlx-lm leaves the trunk of the
# other as it is stored, and so cannot load it. Neither exists outside of tests. The trunk of Kimi K3 has a nested
# configuration: heads/test_kimi.py converts it whole.
_ONLY_HEADS = ("deepseek-v3 dense", "qwen3-next dense", "kimi-k3")
WHOLE = [n for n, case in CASES.items() if case.family != "speculators" and n not in _ONLY_HEADS]


@dataclass
class Whole:
    """made: stored tensors, configuration and canonical heads. trunk: what mlx-lm's model must hold in the end."""

    made: Made
    trunk: Arrays

    def write(self, folder: Path, **changes: Any) -> Path:
        """As a folder with a tokenizer."""
        self.made.write(folder, **changes)
        return with_tokenizer(folder)


def with_tokenizer(folder: Path) -> Path:
    """`folder`, with a tokenizer in it."""
    folder.mkdir(parents=True, exist_ok=True)
    hf_tokenizer(TOKENS).save_pretrained(folder)
    return folder


def whole(name: str, **settings: Any) -> Whole:
    """The whole tiny checkpoint of a case; `settings` change its configuration."""
    case, made = CASES[name], make(name)
    config = made.config | SETTINGS.get(case.family, {}) | settings
    for key in [key for key in made.stored if key in case.trunk or key == "model.norm.weight"]:
        del made.stored[key]
    model_class, args_class = _get_classes(config)
    shapes = {
        key: value.shape
        for key, value in tree_flatten(model_class(args_class.from_dict(config)).parameters())
    }
    trunk = {key: made.stored.get(stored_name(key), numbers(key, shape)) for key, shape in shapes.items()}
    trunk = {
        key: value if value.shape == shapes[key] else numbers(key, shapes[key])
        for key, value in trunk.items()
    }
    stored = store(name, trunk)
    heads = {key: value for key, value in made.stored.items() if key in stored or key not in ALONE}
    return Whole(Made(heads | stored, config, made.canonical), trunk)


def stored_name(key: str) -> str:
    """What the family calls mlx-lm's parameter `key`."""
    return key.replace("language_model.model.", "model.language_model.").replace(
        "language_model.lm_head", "lm_head"
    )


def store(name: str, trunk: Arrays) -> Arrays:
    """The trunk as the family stores it."""
    case = replace(CASES[name], rename={}, scales={}, zero_centred=False, stacked_as="")
    zero_centred = CASES[name].zero_centred
    if case.family == "step-3.5":
        return {rename(key, STEP): value - zero_centred * _is_norm(key) for key, value in trunk.items()}
    blocks: defaultdict[str, Arrays] = defaultdict(dict)
    for key, value in trunk.items():
        match = re.match(r"(.*\.layers\.\d+\.)(.*)", key)
        prefix, rest = match.groups() if match else ("", key)
        if rest.endswith("conv1d.weight"):
            value = np.moveaxis(value, 1, 2)
        shifted = zero_centred and ((rest.rsplit(".", 2)[-2] in SHIFTED) or key.endswith("model.norm.weight"))
        blocks[stored_name(prefix)][rest if match else stored_name(key)] = value - 1 if shifted else value
    return {
        prefix + key: value
        for prefix, block in blocks.items()
        for key, value in store_block(case, block).items()
    }


def _is_norm(key: str) -> bool:
    return "norm" in key and key.endswith(".weight")


def rename(key: str, names: dict[str, str]) -> str:
    """`key` with the first of `names` in it replaced."""
    for old, new in names.items():
        if old in key:
            return key.replace(old, new)
    return key


def config_of(folder: Path) -> dict[str, Any]:
    """The content of config.json."""
    return dict(json.loads((folder / "config.json").read_text()))
