"""A tiny Qwen3.5 whose text is known, and heads that draft it, in whatever convention and form.

The model is a table: token v is followed by (v + 7) % 157, whatever came before. Its embedding is one-hot, its layers
add nothing, and its last norm turns the sign of two thirds of the states, so that a head sees which state it reads.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten
from mlx_lm.models import qwen3_5

from tests.convert.checkpoints import write_safetensors
from tests.tiny import VOCABULARY, hf_tokenizer, never_end

V, D, STEP = VOCABULARY, 160, 7
GAIN = np.where(np.arange(D) % 3, -1.0, 1.0).astype(np.float32)  # [D] of the last norm
TEXT: dict[str, Any] = {
    "model_type": "qwen3_5_text",
    "hidden_size": D,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "full_attention_interval": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "vocab_size": V,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "partial_rotary_factor": 0.5,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
    "linear_num_value_heads": 2,
    "linear_num_key_heads": 1,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_conv_kernel_dim": 4,
    "num_experts": 0,
    "mtp_num_hidden_layers": 1,
}
CONFIG: dict[str, Any] = {"model_type": "qwen3_5", "text_config": TEXT}
Arrays = dict[str, np.ndarray]


def table_folder(folder: Path) -> Path:
    """The model as an mlx-lm folder with a tokenizer."""
    folder.mkdir(parents=True)
    model = qwen3_5.Model(qwen3_5.ModelArgs.from_dict(CONFIG))
    weights = {name: mx.zeros(value.shape) for name, value in tree_flatten(model.parameters())}
    one_hot = np.eye(V, D, dtype=np.float32)
    for name in weights:
        if "norm" in name:
            weights[name] = mx.ones(weights[name].shape)
    weights["language_model.model.norm.weight"] = mx.array(GAIN)
    weights["language_model.model.embed_tokens.weight"] = mx.array(one_hot)
    weights["language_model.lm_head.weight"] = mx.array(GAIN * one_hot[(np.arange(V) - STEP) % V])
    mx.save_safetensors(str(folder / "model.safetensors"), weights, metadata={"format": "mlx"})
    (folder / "config.json").write_text(json.dumps(CONFIG))
    hf_tokenizer(V).save_pretrained(folder)
    never_end(folder)
    return folder


def half_converted() -> Arrays:
    """The same with norms that are stored around zero in the layer alone, and a layer that only these silence."""
    tensors = heads(plain=True)
    rng = np.random.default_rng(0)
    for name, value in tensors.items():
        if name.startswith("layers.") and value.ndim == 1:
            tensors[name] = value - (2 if "post_attention" in name else 1)
        elif ".mlp." in name:
            tensors[name] = rng.normal(size=value.shape).astype(np.float32)
    return tensors


def heads(state: str = "post-norm", *, plain: bool, gain: float = 1.0) -> Arrays:
    """A head that is always right, under the names that it has inside its module.

    state: of the trunk that it reads. plain: how norms are stored. gain: of the q and k norms.
    """
    layer = qwen3_5.DecoderLayer(qwen3_5.TextModelArgs.from_dict(TEXT), layer_idx=1)
    tensors: Arrays = {
        f"layers.0.{name}": np.ones(value.shape, np.float32)
        if "norm" in name
        else np.zeros(value.shape, np.float32)
        for name, value in tree_flatten(layer.parameters())
    }
    for name in ("q_norm", "k_norm"):
        tensors[f"layers.0.self_attn.{name}.weight"] *= gain
    now = np.arange(V)
    then = (now + STEP) % V
    shift = np.zeros((D, D), np.float32)  # state of v -> that of v + 7, whose answer is v + 14
    shift[then, now] = -GAIN[then] * (1 if state == "pre-norm" else GAIN[now])
    tensors["fc.weight"] = np.hstack([np.zeros((D, D), np.float32), shift])
    tensors["pre_fc_norm_embedding.weight"] = np.ones(D, np.float32)
    # 1 added to the one, or taken off the other, turns a sign; the weight above turns the other.
    tensors["pre_fc_norm_hidden.weight"] = np.full(D, -0.5, np.float32)
    tensors["norm.weight"] = np.full(D, 0.5, np.float32)
    return tensors if plain else {name: v - 1 if v.ndim == 1 else v for name, v in tensors.items()}


def split_folder(folder: Path, tensors: Arrays) -> Path:
    """Heads alone, as mlx-vlm splits them from their model."""
    folder.mkdir(parents=True)
    packed = {name: "U32" for name, value in tensors.items() if value.dtype == np.uint32}
    write_safetensors(folder / "model.safetensors", tensors, packed)
    config = {"model_type": "qwen3_5_mtp", "text_config": TEXT, "block_size": 3}
    (folder / "config.json").write_text(json.dumps(config))
    return folder
