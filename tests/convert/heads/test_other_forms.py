"""Proves that Medusa's, Meta's and PEFT's tensors become the canonical ones, and what does not fit is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm.models import llama

from mtp_mlx.convert.heads.plan import find_heads, plan_heads
from mtp_mlx.convert.read.checkpoint import open_checkpoint
from mtp_mlx.errors import ConversionError
from tests.convert.checkpoints import write_safetensors
from tests.convert.heads.head_checkpoints import numbers
from tests.convert.read.torch_files import write_torch

D, V = 48, 40


def built(path: Path) -> tuple[Any, dict[str, np.ndarray]]:
    """The plan of a checkpoint and its canonical tensors."""
    checkpoint = open_checkpoint(path)
    plan = plan_heads(checkpoint, find_heads(checkpoint))
    return plan, {target.name: target.build(checkpoint.tensors) for target in plan.targets}


def medusa(heads: int = 3, depth: int = 2) -> dict[str, np.ndarray]:
    """The state dict of medusa_lm_head.pt."""
    stored = {}
    for i in range(heads):
        for j in range(depth):
            stored[f"{i}.{j}.linear.weight"] = numbers(f"w{i}{j}", (D, D))
            stored[f"{i}.{j}.linear.bias"] = numbers(f"b{i}{j}", (D,))
        stored[f"{i}.{depth}.weight"] = numbers(f"h{i}", (V, D))
    return stored


def test_medusa(tmp_path: Path) -> None:
    stored = medusa()
    write_torch(tmp_path / "medusa_lm_head.pt", stored)
    (tmp_path / "config.json").write_text(
        '{"medusa_num_heads": 2, "medusa_num_layers": 1}'
    )  # as published: wrong
    plan, found = built(tmp_path)
    expected = {f"heads.{i}.lm_head.weight": stored[f"{i}.2.weight"] for i in range(3)}
    for i in range(3):
        for j in range(2):
            for part in ("weight", "bias"):
                expected[f"heads.{i}.residual.{j}.{part}"] = stored[f"{i}.{j}.linear.{part}"]
    assert found.keys() == expected.keys() and plan.count == 3
    for name, value in expected.items():
        np.testing.assert_array_equal(found[name], value)
    convention = plan.convention
    assert (convention.kind, convention.first_hidden, convention.lm_head) == ("medusa", "post-norm", "own")


def test_medusa_with_a_tensor_missing_and_one_misshapen(tmp_path: Path) -> None:
    stored = medusa()
    del stored["1.0.linear.bias"]
    stored["2.2.weight"] = np.zeros((V, D + 1), np.float32)
    write_torch(tmp_path / "medusa_lm_head.pt", stored)
    with pytest.raises(
        ConversionError, match=r"missing 1\.0\.linear\.bias \[48\]; 2\.2\.weight is \[40, 49\], \[40, 48\]"
    ):
        built(tmp_path)


PARAMS = {
    "dim": D,
    "n_layers": 6,
    "n_heads": 4,
    "n_kv_heads": 2,
    "multiple_of": 8,
    "vocab_size": V,
    "n_future_tokens": 4,
}
WIDTH = 128  # 2/3 of 4 * 48, a multiple of 8
LAYER = {
    "attention.wq": (D, D),
    "attention.wk": (24, D),
    "attention.wv": (24, D),
    "attention.wo": (D, D),
    "feed_forward.w1": (WIDTH, D),
    "feed_forward.w2": (D, WIDTH),
    "feed_forward.w3": (WIDTH, D),
    "attention_norm": (D,),
    "ffn_norm": (D,),
}


def meta() -> dict[str, np.ndarray]:
    """Meta's consolidated.pth: 3 trunk layers, of which the last is the next-token head, and 3 extra heads."""
    blocks = [f"layers.{i}" for i in range(3)] + [f"extra_heads.{i}" for i in range(3)]
    stored = {
        f"{b}.{name}.weight": numbers(f"{b}{name}", shape) for b in blocks for name, shape in LAYER.items()
    }
    return stored | {"tok_embeddings.weight": numbers("e", (V, D)), "norm.weight": numbers("n", (D,))}


def split_pairs(rows: np.ndarray, heads: int) -> np.ndarray:
    """Neighbouring rows (2i, 2i + 1) of each attention head -> (i, i + half), row by row."""
    out, size = np.empty_like(rows), rows.shape[0] // heads
    for head in range(heads):
        for i in range(size // 2):
            out[head * size + i] = rows[head * size + 2 * i]
            out[head * size + size // 2 + i] = rows[head * size + 2 * i + 1]
    return out


def test_meta(tmp_path: Path) -> None:
    stored = meta()
    write_torch(tmp_path / "consolidated.pth", stored)
    (tmp_path / "params.json").write_text(json.dumps(PARAMS))
    plan, found = built(tmp_path)
    assert plan.count == 3 and len(found) == 3 * len(LAYER)
    assert plan.model_config["num_hidden_layers"] == 3 and plan.model_config["intermediate_size"] == WIDTH
    convention = plan.convention
    assert (convention.kind, convention.first_hidden) == ("parallel", "before-last-layer")
    assert (convention.recycled_hidden, convention.output_norm) == ("none", "trunk")
    args = llama.ModelArgs.from_dict(plan.model_config)
    wanted = {name: value.shape for name, value in tree_flatten(llama.TransformerBlock(args).parameters())}
    for i in range(3):
        block, head = f"heads.{i}.block.", f"extra_heads.{i}."
        assert {
            name.removeprefix(block): v.shape for name, v in found.items() if name.startswith(block)
        } == wanted
        for name, mine, heads in (("q", "wq", 4), ("k", "wk", 2)):
            expected = split_pairs(stored[f"{head}attention.{mine}.weight"], heads)
            np.testing.assert_array_equal(found[f"{block}self_attn.{name}_proj.weight"], expected)
        for name, mine in (
            ("self_attn.v_proj", "attention.wv"),
            ("self_attn.o_proj", "attention.wo"),
            ("mlp.gate_proj", "feed_forward.w1"),
            ("mlp.down_proj", "feed_forward.w2"),
            ("mlp.up_proj", "feed_forward.w3"),
            ("input_layernorm", "attention_norm"),
            ("post_attention_layernorm", "ffn_norm"),
        ):
            np.testing.assert_array_equal(found[f"{block}{name}.weight"], stored[f"{head}{mine}.weight"])


def test_meta_without_its_params(tmp_path: Path) -> None:
    write_torch(tmp_path / "consolidated.pth", meta())
    with pytest.raises(ConversionError, match="params.json lacks 'dim'"):
        built(tmp_path)


def test_a_peft_adapter(tmp_path: Path) -> None:
    layers = {"model.layers.0.self_attn.q_proj": (64, D), "model.layers.1.mlp.down_proj": (D, 80)}
    stored = {}
    for layer, (out, width) in layers.items():
        stored[f"base_model.model.{layer}.lora_A.weight"] = numbers(f"a{layer}", (8, width))
        stored[f"base_model.model.{layer}.lora_B.weight"] = numbers(f"b{layer}", (out, 8))
    write_safetensors(tmp_path / "adapter_model.safetensors", stored)
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 8, "lora_alpha": 16}')
    plan, found = built(tmp_path)
    assert plan.convention.kind == "lora" and len(found) == 4
    for layer in layers:
        path = layer.removeprefix("model.")
        name = f"base_model.model.{layer}.lora_"
        np.testing.assert_array_equal(found[f"low_rank.{path}.down"], stored[f"{name}A.weight"].T)
        np.testing.assert_array_equal(found[f"low_rank.{path}.up"], stored[f"{name}B.weight"].T)
    del stored["base_model.model.model.layers.1.mlp.down_proj.lora_B.weight"]
    write_safetensors(tmp_path / "adapter_model.safetensors", stored)
    with pytest.raises(
        ConversionError, match=r"missing base_model\.model\.model\.layers\.1\.mlp\.down_proj\.lora_B\.weight"
    ):
        built(tmp_path)
