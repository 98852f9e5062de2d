"""A llama with O-PTP slots in plain numpy float64, in the released code's own names: an independent oracle.

One causal pass of prompt tokens (base weights) followed by slots (base plus low-rank update). Slot j predicts the
token that stands j places behind the prompt and is turned by the rotary angle of the place before it.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

Arrays = Mapping[str, np.ndarray]


def embed_uniform(arrays: Arrays, kind: str, uniforms: np.ndarray) -> np.ndarray:
    """[k, D] of uniforms [k], as the released `auxiliary_embed.py` defines them."""
    if kind == "interpolation":
        table = arrays["embedding.weight"].astype(np.float64)
        place = uniforms.astype(np.float64) * (len(table) - 1)
        left = np.minimum(np.floor(place), len(table) - 2).astype(int)
        share = (place - left)[:, None]
        return (1 - share) * table[left] + share * table[left + 1]
    if kind == "binary":
        whole = uniforms.astype(np.float32).view(np.int32)
        features = np.array(
            [[(value >> bit) & 1 for bit in range(31, -1, -1)] for value in whole], np.float64
        )
    else:
        features = np.array(
            [[value % (1 / m) for m in range(1, 33)] for value in uniforms.astype(np.float64)]
        )
    return features @ arrays["weight"].astype(np.float64).T + arrays["bias"]


def _norm(x: np.ndarray, weight: np.ndarray) -> np.ndarray:
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5) * weight


def _rope(x: np.ndarray, positions: np.ndarray, theta: float = 10000.0) -> np.ndarray:
    """x [R, H, hd]; the halves of a head are turned together."""
    half = x.shape[-1] // 2
    angles = positions[:, None, None] * theta ** (-np.arange(half) / half)
    a, b = x[..., :half], x[..., half:]
    cos, sin = np.cos(angles), np.sin(angles)
    return np.concatenate([a * cos - b * sin, a * sin + b * cos], axis=-1)


def logits(
    base: Arrays,
    low_rank: Arrays,
    scale: float,
    tokens: list[int],
    slots: np.ndarray,
    heads: int,
    kv_heads: int,
) -> np.ndarray:
    """[T + k, V] logits.

    Args:
        base: Hugging Face names of a llama with an untied head.
        low_rank: "layers.{i}.<layer>.A" [r, in] and ".B" [out, r].
        slots: [k, D] embeddings of the slots.
    """
    w = {name: np.asarray(value, np.float64) for name, value in base.items()}
    count, rows = len(tokens), len(tokens) + len(slots)
    gate = np.concatenate([np.zeros(count), np.ones(len(slots))])[:, None]
    positions = np.concatenate([np.arange(count), count - 1 + np.arange(len(slots))])
    x = np.concatenate([w["model.embed_tokens.weight"][tokens], slots])
    layers = 1 + max(int(name.split(".")[2]) for name in w if name.startswith("model.layers."))
    for i in range(layers):

        def apply(name: str, h: np.ndarray, i: int = i) -> np.ndarray:
            y = h @ w[f"model.layers.{i}.{name}.weight"].T
            a, b = low_rank.get(f"layers.{i}.{name}.A"), low_rank.get(f"layers.{i}.{name}.B")
            return y if a is None or b is None else y + gate * scale * (h @ a.T.astype(np.float64)) @ b.T

        h = _norm(x, w[f"model.layers.{i}.input_layernorm.weight"])
        q = _rope(apply("self_attn.q_proj", h).reshape(rows, heads, -1), positions)
        k = _rope(apply("self_attn.k_proj", h).reshape(rows, kv_heads, -1), positions)
        v = apply("self_attn.v_proj", h).reshape(rows, kv_heads, -1)
        k, v = (np.repeat(part, heads // kv_heads, axis=1) for part in (k, v))
        scores = np.einsum("thd,shd->hts", q, k) / np.sqrt(q.shape[-1])
        scores = np.where(np.tril(np.ones((rows, rows), bool)), scores, -np.inf)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        mixed = np.einsum("hts,shd->thd", weights / weights.sum(-1, keepdims=True), v)
        x = x + apply("self_attn.o_proj", mixed.reshape(rows, -1))
        h = _norm(x, w[f"model.layers.{i}.post_attention_layernorm.weight"])
        gated = apply("mlp.gate_proj", h)
        x = x + apply("mlp.down_proj", gated / (1 + np.exp(-gated)) * apply("mlp.up_proj", h))
    return _norm(x, w["model.norm.weight"]) @ w["lm_head.weight"].T
