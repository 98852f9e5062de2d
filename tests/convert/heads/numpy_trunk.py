"""Forward passes of llama and qwen3 in plain numpy, from tensors under their Hugging Face names: an oracle."""

from __future__ import annotations

from typing import Any

import numpy as np

Tensors = dict[str, np.ndarray]


def norm(x: np.ndarray, weight: np.ndarray, eps: float) -> np.ndarray:
    """RMS norm over the last axis."""
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * weight


def rope(x: np.ndarray, base: float) -> np.ndarray:
    """x [T, H, hd], row t at position t; halves are turned against each other."""
    half = x.shape[-1] // 2
    angles = np.arange(len(x))[:, None, None] / base ** (np.arange(half) / half)
    a, b = x[..., :half], x[..., half:]
    return np.concatenate(
        [a * np.cos(angles) - b * np.sin(angles), a * np.sin(angles) + b * np.cos(angles)], -1
    )


def logits(tensors: Tensors, config: dict[str, Any], ids: list[int]) -> np.ndarray:
    """[T, V] float64 logits of one causal sequence; ids index the embedding table, the mask's like any other."""
    w = {name: value.astype(np.float64) for name, value in tensors.items()}
    eps, size = config["rms_norm_eps"], config["head_dim"]
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    x = w["model.embed_tokens.weight"][ids]
    visible = np.tril(np.ones((len(ids), len(ids)), dtype=bool))
    for index in range(config["num_hidden_layers"]):
        layer = {name.split(f"layers.{index}.")[1]: v for name, v in w.items() if f"layers.{index}." in name}
        h = norm(x, layer["input_layernorm.weight"], eps)
        q, k, v = (h @ layer[f"self_attn.{name}_proj.weight"].T for name in "qkv")
        q, k, v = (rows.reshape(len(ids), -1, size) for rows in (q, k, v))
        if config["model_type"] == "qwen3":
            q = norm(q, layer["self_attn.q_norm.weight"], eps)
            k = norm(k, layer["self_attn.k_norm.weight"], eps)
        q, k = rope(q, config["rope_theta"]), rope(k, config["rope_theta"])
        k, v = (np.repeat(rows, heads // kv_heads, axis=1) for rows in (k, v))
        scores = np.where(visible, np.einsum("thd,shd->hts", q, k) / np.sqrt(size), -np.inf)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        mixed = np.einsum("hts,shd->thd", weights / weights.sum(-1, keepdims=True), v)
        x = x + mixed.reshape(len(ids), -1) @ layer["self_attn.o_proj.weight"].T
        h = norm(x, layer["post_attention_layernorm.weight"], eps)
        gate = h @ layer["mlp.gate_proj.weight"].T
        up = h @ layer["mlp.up_proj.weight"].T
        x = x + (gate / (1 + np.exp(-gate)) * up) @ layer["mlp.down_proj.weight"].T
    head = w.get("lm_head.weight", w["model.embed_tokens.weight"])
    return norm(x, w["model.norm.weight"], eps) @ head.T
