"""Proves that quantised matrices are unpacked as mlx does it, and that heads run from what was taken apart.

Latent attention stores keys and values as one matrix, which mlx-lm's layers keep as two.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx_lm.models.mla import MultiLinear, QuantizedMultiLinear
from mlx_lm.utils import load_model

from mtp_mlx.convert.heads.unpack import numbers_of
from mtp_mlx.drafters.registry import load_folder
from tests.convert.heads import head_checkpoints
from tests.convert.heads.form_checkpoints import quantised, save
from tests.convert.heads.head_cases import CASES, Arrays
from tests.convert.heads.head_checkpoints import Made
from tests.convert.heads.head_configs import L
from tests.convert.heads.numpy_layers import Latent, Layer, SigmoidExperts
from tests.convert.heads.parity_checkpoints import parity_checkpoint
from tests.convert.heads.parity_families import FAMILIES, Family
from tests.convert.heads.parity_setup import Parity, convert, convert_heads, write_pytorch
from tests.convert.heads.test_forms import check

HEADS, RANK, NOPE, V_DIM = 4, 64, 32, 32
SIZES = {"hidden_size": 64, "intermediate_size": 96, "moe_intermediate_size": 32, "q_lora_rank": 32}
SIZES |= {"kv_lora_rank": RANK, "qk_nope_head_dim": NOPE, "v_head_dim": V_DIM}
KV = f"model.layers.{L}.self_attn.kv_b_proj.weight"
GROUPS = {"group_size": 32}


@pytest.mark.parametrize(
    ("bits", "group_size", "mode", "scales"),
    [(bits, 32, "affine", "F32") for bits in (2, 3, 4, 5, 6, 8)]
    + [(4, 64, "affine", "F16"), (4, 32, "mxfp4", "U8"), (8, 32, "mxfp8", "U8"), (4, 16, "nvfp4", "U8")],
)
def test_numbers_are_those_of_mlx(bits: int, group_size: int, mode: str, scales: str) -> None:
    values = mx.random.normal((3, 5, 192), key=mx.random.key(bits)) * 3
    values = values.astype(mx.float16 if scales == "F16" else mx.float32)
    parts = mx.quantize(values, group_size, bits, mode=mode)
    types = ["U32", *([scales] * (len(parts) - 1))]
    found = numbers_of([np.array(part) for part in parts], types, bits, group_size, mode)
    wide = [parts[0], *(part if scales == "U8" else part.astype(mx.float32) for part in parts[1:])]
    expected = np.array(mx.dequantize(*wide, group_size=group_size, bits=bits, mode=mode).astype(mx.float32))
    assert found.shape == (3, 5, 192) and found.dtype == np.float32
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-6)


def latent(folder: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Family, Made, Path]:
    """GLM-4.7-Flash whose matrices can be quantised: the oracle's family, the original, the converted trunk."""
    case = CASES["glm-4.7-flash"]
    monkeypatch.setattr(head_checkpoints, "D", 64)
    monkeypatch.setitem(CASES, "wide", replace(case, config=case.config | SIZES))
    made = parity_checkpoint("wide", {})
    attention = Latent(HEADS, RANK, NOPE, 8, V_DIM)
    experts = Layer(attention, SigmoidExperts(2))
    family = replace(FAMILIES["glm-4.7-flash"], heads=[[experts]], trunk=[Layer(attention), *[experts] * 3])
    return family, made, convert(write_pytorch(made, folder / "model"), folder / "trunk", "--trunk-only")


def split_by_mlx_lm(kv: np.ndarray, packed: Arrays) -> np.ndarray:
    """`packed` gets the two quantised stacks that mlx-lm makes of `kv`; what they stand for, as one matrix."""
    whole = kv.reshape(HEADS, NOPE + V_DIM, RANK)
    stacks = {"embed_q": whole[:, :NOPE].swapaxes(1, 2), "unembed_out": whole[:, NOPE:]}
    found, meant = quantised({KV.replace("kv_b_proj", n): v for n, v in stacks.items()}, {"": 4}, **GROUPS)
    packed |= found
    keys, values = (meant[KV.replace("kv_b_proj", name)] for name in stacks)
    return np.concatenate([keys.swapaxes(1, 2), values], axis=1).reshape(kv.shape)


@pytest.mark.parametrize("form", ["one matrix", "one matrix in nvfp4", "two stacks"])
def test_quantised_latent_attention(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: str) -> None:
    """Keys are transposed, so they are dequantised; values stay as they are."""
    family, made, trunk = latent(tmp_path, monkeypatch)
    own = {n: v for n, v in made.stored.items() if n.startswith(f"model.layers.{L}.")}
    for shared in ("embed_tokens.weight", "shared_head.head.weight"):
        del own[f"model.layers.{L}.{shared}"]
    router = f"model.layers.{L}.mlp.gate.weight"
    how = {"group_size": 16, "mode": "nvfp4"} if "nvfp4" in form else {**GROUPS, "mode": "affine"}
    packed, meant = quantised({n: v for n, v in own.items() if n != router}, {"": 4}, **how)
    packed[router] = own[router]
    if form == "two stacks":
        packed = {n: v for n, v in packed.items() if "kv_b_proj" not in n}
        meant[KV] = split_by_mlx_lm(own[KV], packed)
    (tmp_path / "source").mkdir()
    save(tmp_path / "source" / "model.safetensors", packed)
    (tmp_path / "source" / "config.json").write_text(json.dumps(made.config))
    folder = convert_heads(tmp_path / "source", tmp_path / "heads")
    model, _ = load_model(trunk)
    heads, info = load_folder(folder, model)
    heads.set_dtype(mx.float32)
    made = replace(made, stored=made.stored | meant)
    parity = check(Parity(family, made, trunk, folder, model, heads, info))
    attention = parity.heads.heads[0].block.self_attn
    assert type(attention.unembed_out) is QuantizedMultiLinear
    assert type(attention.embed_q) is (QuantizedMultiLinear if form == "two stacks" else MultiLinear)
    said = [note for note in info.source["notes"] if "dequantised" in note]
    assert len(said) == (0 if form == "two stacks" else 1)


def test_a_fuse_weight_whose_halves_are_no_whole_groups(tmp_path: Path) -> None:
    """MiMo's is stored hidden-first: 2 x 48 columns in three groups of 32."""
    parity = Parity.of("mimo-7b", tmp_path / "whole")
    name = "model.mtp_layers.0.input_proj.weight"
    own = {n: v for n, v in parity.made.stored.items() if "mtp_layers" in n}
    packed, meant = quantised({name: own[name]}, {"": 8}, **GROUPS)
    (tmp_path / "source").mkdir()
    save(tmp_path / "source" / "model.safetensors", own | packed)
    (tmp_path / "source" / "config.json").write_text(json.dumps(parity.made.config))
    folder = convert_heads(tmp_path / "source", tmp_path / "heads")
    heads, info = load_folder(folder, parity.model)
    made = replace(parity.made, stored=parity.made.stored | meant)
    found = check(replace(parity, made=made, heads=heads, info=info, heads_folder=folder))
    assert type(found.heads.heads[0].fuse) is nn.Linear
