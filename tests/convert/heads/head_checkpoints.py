"""Tiny random checkpoints with MTP heads, one for each case, written from the tensors a right conversion gives.

`make(name)` draws the canonical tensors (the block's names and shapes are those of mlx-lm's own layer) and derives
the stored ones as the case says. All numbers are multiples of 1/64, so that every step is exact.
"""

from __future__ import annotations

import importlib
import json
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from mlx.utils import tree_flatten

from tests.convert.checkpoints import write_safetensors
from tests.convert.heads.head_cases import CASES, SEQUENCES, Arrays, Case
from tests.convert.heads.head_configs import D, L, V

# What families call the trunk's embedding, where that is not "model.embed_tokens".
EMBEDDINGS = {"nemotron-h": "backbone.embeddings", "ling": "model.word_embeddings"}


@dataclass
class Made:
    """A tiny checkpoint: its stored tensors and configuration, and what a right conversion makes of them."""

    stored: Arrays
    config: dict[str, Any]
    canonical: Arrays

    def write(self, folder: Path, **changes: Any) -> Path:
        """As a folder; `changes` are settings to change or (None) to leave out."""
        folder.mkdir(parents=True, exist_ok=True)
        write_safetensors(folder / "model.safetensors", self.stored)
        (folder / "config.json").write_text(json.dumps(self.config | changes))
        return folder


def numbers(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Random multiples of 1/64 in (-1, 1), the same for the same name."""
    draw = np.random.default_rng(zlib.crc32(name.encode())).integers(-63, 64, shape)
    return (draw / 64).astype(np.float32)


def model_config(case: Case) -> dict[str, Any]:
    """The language model's part of the configuration."""
    return case.config.get("text_config") or case.config.get("transformer_layer_config") or case.config


def block_shapes(name: str, i: int) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the parameters of mlx-lm's own layer(s) for head i."""
    case = CASES[name]
    module_name, class_name, args_class, arguments = case.layer
    module = importlib.import_module(f"mlx_lm.models.{module_name}")
    config = {key: value for key, value in (model_config(case) | case.layer_config).items()}
    if case.family == "exaone-moe":
        config |= {"layer_types": config["mtp_layer_types"] + config["layer_types"]}
    args = getattr(module, args_class).from_dict(config)
    shapes: dict[str, tuple[int, ...]] = {}
    for j, extra in enumerate(SEQUENCES.get(name, ({},))):
        layer = getattr(module, class_name)(args, **arguments(i), **extra)
        prefix = f"{j}." if name in SEQUENCES else ""
        shapes |= {prefix + key: value.shape for key, value in tree_flatten(layer.parameters())}
    return shapes


def make(name: str) -> Made:
    """The tiny checkpoint of a case."""
    case = CASES[name]
    trunk_prefix = EMBEDDINGS.get(case.family, "model.embed_tokens")
    stored: Arrays = {
        f"{trunk_prefix}.weight": numbers("embed", (V, D)),
        "lm_head.weight": numbers("head", (V, D)),
        "model.norm.weight": numbers("model.norm.weight", (D,)),
        **case.trunk,
    }
    if case.family == "speculators":
        stored = {}
    canonical: Arrays = {}
    for i in range(case.heads):
        n = L + i if case.past_trunk else i
        for part, stem in case.names.items():
            key = stem.format(n=n) + ".weight"
            value = numbers(f"{i}{part}", (D, 2 * D) if part == "fuse" else (D,))
            canonical[f"heads.{i}.{part}.weight"] = stored.get(
                key, value
            )  # ERNIE's output norm is the trunk's
            stored.setdefault(key, _head_part(case, part, value))
        for key, shape in block_shapes(name, i).items():
            canonical[f"heads.{i}.block.{key}"] = numbers(f"{i}{key}", shape)
        block = {key: numbers(f"{i}{key}", shape) for key, shape in block_shapes(name, i).items()}
        stored |= {case.block.format(n=n) + key: value for key, value in store_block(case, block).items()}
        for key, trunk in case.copies.items():
            stored[key.format(n=n)] = stored[trunk].copy()
        for part, key in case.own.items():
            canonical[f"heads.{i}.{part}.weight"] = stored[key.format(n=n)] = numbers(f"{i}{part}", (V, D))
    return Made(stored, case.config, canonical)


def _head_part(case: Case, part: str, value: np.ndarray) -> np.ndarray:
    if part == "fuse" and case.order == "hidden":
        embedding, hidden = value[:, :D], value[:, D:]
        return np.hstack([hidden, embedding])
    return value - 1 if case.zero_centred and part.startswith("norm") else value


def store_block(case: Case, block: Arrays) -> Arrays:
    """A block as the family stores it."""
    out: Arrays = {}
    for name, value in block.items():
        stem, part = name.rsplit(".", 1)
        if stem.endswith("embed_q"):
            values = block[name.replace("embed_q", "unembed_out")]
            heads = [np.vstack([value[h].T, values[h]]) for h in range(len(value))]
            out[f"{stem.removesuffix('embed_q')}kv_b_proj.{part}"] = np.vstack(heads)
        elif stem.endswith("unembed_out"):
            continue
        elif ".switch_mlp." in name or name.startswith("switch_mlp."):
            out |= _store_experts(case, name, block)
        elif stem.endswith("norm") and case.zero_centred:
            out[name] = value - 1
        else:
            out[name] = value / case.scales.get(stem.rsplit(".", 1)[-1], 1.0)
    for old, new in case.rename.items():
        out = {key.replace(old, new): value for key, value in out.items()}
    return out


def _store_experts(case: Case, name: str, block: Arrays) -> Arrays:
    stem, projection, part = name.rsplit(".", 2)
    if case.stacked_as:
        return {f"{case.stacked_as}.{projection}.{part}": block[name]}
    experts = stem.replace("switch_mlp", "experts")
    if not case.fused_experts:
        projection = {"fc1": "up_proj", "fc2": "down_proj"}.get(projection, projection)
        return {f"{experts}.{e}.{projection}.{part}": value for e, value in enumerate(block[name])}
    if projection == "down_proj":
        return {f"{experts}.down_proj": block[name]}
    if projection == "up_proj":
        return {}
    both = zip(block[name], block[f"{stem}.up_proj.{part}"])
    return {f"{experts}.gate_up_proj": np.stack([np.vstack(pair) for pair in both])}
