"""The forms in which heads of a tiny Qwen3.5 are found: split from the model, inside it, beside it, quantised or not.

Every form is made of the same checkpoint under its original names, with which the numpy oracle reckons.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.utils import load_model

from mtp_mlx.drafters.registry import load_folder
from tests.convert.checkpoints import write_safetensors
from tests.convert.heads import head_checkpoints
from tests.convert.heads.head_cases import CASES, Arrays
from tests.convert.heads.head_checkpoints import Made
from tests.convert.heads.parity_checkpoints import parity_checkpoint
from tests.convert.heads.parity_families import FAMILIES
from tests.convert.heads.parity_setup import Parity, convert, write_pytorch

WIDTH = 64  # hidden size: two groups of 32
_SIZES = {
    "hidden_size": WIDTH,
    "intermediate_size": 96,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
}


@dataclass
class Forms:
    """A checkpoint whose matrices can be quantised, its trunk as mlx-lm has it, and its heads.

    Attributes:
        family: its name in `parity_families`. made: the original, as a whole.
        trunk: the trunk alone, converted. heads: the heads under their original names, `mtp.*`.
    """

    family: str
    made: Made
    trunk: Path
    heads: Arrays

    @staticmethod
    def of(family: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Forms:
        """Makes the original and converts its trunk."""
        case = CASES[family]
        text = case.config.get("text_config") or case.config
        config = text | {key: value for key, value in _SIZES.items() if key in text}
        if "text_config" in case.config:
            config = case.config | {"text_config": config}
        monkeypatch.setattr(head_checkpoints, "D", WIDTH)
        monkeypatch.setitem(CASES, "wide", replace(case, config=config))
        made = parity_checkpoint("wide", {})
        trunk = convert(write_pytorch(made, folder / "model"), folder / "trunk", "--trunk-only")
        heads = {name: value for name, value in made.stored.items() if name.startswith("mtp.")}
        return Forms(family, made, trunk, heads)

    @property
    def text_config(self) -> dict[str, Any]:
        """The language model's configuration."""
        return dict(self.made.config.get("text_config") or self.made.config)

    def split(self, folder: Path, tensors: Arrays, **config: Any) -> Path:
        """A repository of heads alone, as mlx-vlm splits them."""
        config = {
            "model_type": "qwen3_5_mtp",
            "text_config": self.text_config,
            "block_size": 3,
            "tie_word_embeddings": False,
        } | config
        folder.mkdir()
        save(folder / "model.safetensors", {name.removeprefix("mtp."): tensors[name] for name in tensors})
        (folder / "config.json").write_text(json.dumps(config))
        return folder

    def parity(self, heads_folder: Path, stored: Arrays | None = None) -> Parity:
        """The trunk and converted heads beside the oracle; `stored`: what quantised heads stand for."""
        model, _ = load_model(self.trunk)
        heads, info = load_folder(heads_folder, model)
        heads.set_dtype(mx.float32)
        made = replace(self.made, stored=self.made.stored | (stored or {}))
        return Parity(FAMILIES[self.family], made, self.trunk, heads_folder, model, heads, info)


def plain(heads: Arrays) -> Arrays:
    """Heads whose norms are stored as gains: 1 is added to them."""
    return {name: value + 1 if _is_norm(name, value) else value for name, value in heads.items()}


def _is_norm(name: str, value: np.ndarray) -> bool:
    return value.ndim == 1 and "norm" in name


def stacked(heads: Arrays) -> Arrays:
    """Heads whose fused experts are stored as mlx-lm has them."""
    out = dict(heads)
    for name in heads:
        if name.endswith(".experts.gate_up_proj"):
            stem = name.replace("experts.gate_up_proj", "switch_mlp.")
            gate, up = np.split(out.pop(name), 2, axis=-2)
            out |= {f"{stem}gate_proj.weight": gate, f"{stem}up_proj.weight": up}
        elif name.endswith(".experts.down_proj"):
            out[name.replace("experts.down_proj", "switch_mlp.down_proj.weight")] = out.pop(name)
    return out


def quantised(heads: Arrays, bits: dict[str, int], **how: Any) -> tuple[Arrays, Arrays]:
    """Heads with quantised matrices, and the values that those stand for, under the same names.

    bits: of the matrices whose name ends so; "" is for the rest. how: as for `mx.quantize`.
    """
    packed, meant = dict(heads), {}
    for name, value in heads.items():
        if value.ndim < 2 or value.shape[-1] % how["group_size"]:
            continue
        own = next((n for end, n in bits.items() if end and name.endswith(end)), bits[""])
        parts = mx.quantize(mx.array(value), bits=own, **how)
        stem = name.removesuffix(".weight")
        keys = (name, f"{stem}.scales", f"{stem}.biases")
        packed |= {key: np.array(part) for key, part in zip(keys, parts)}
        whole = mx.dequantize(*parts, bits=own, **how)
        meant[name] = np.array(whole.astype(mx.float32))
    return packed, meant


def save(path: Path, tensors: Arrays) -> Path:
    """A safetensors file, quantised matrices included."""
    packed = {name: "U32" for name, value in tensors.items() if value.dtype == np.uint32}
    return write_safetensors(path, tensors, packed)
