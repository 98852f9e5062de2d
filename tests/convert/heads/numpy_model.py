"""A llama / qwen2 / qwen3 forward pass in plain numpy, in GGUF's own row order and names: an independent oracle.

For llama the rows of q and k are in llama.cpp's order, where rope turns *neighbouring* pairs (2i, 2i+1); so
nothing here un-permutes anything.
"""

from __future__ import annotations

import numpy as np

from tests.convert.gguf.gguf_files import HEAD_DIM, HEADS, KV_HEADS, LAYERS


def rope(x: np.ndarray, freqs: np.ndarray, neighbours: bool) -> np.ndarray:
    """x (T, H, hd), row t at position t; freqs (hd / 2,)."""
    angles = np.arange(len(x))[:, None, None] * freqs
    cos, sin = np.cos(angles), np.sin(angles)
    half = x.shape[-1] // 2
    a, b = (x[..., ::2], x[..., 1::2]) if neighbours else (x[..., :half], x[..., half:])
    turned = a * cos - b * sin, a * sin + b * cos
    if neighbours:
        return np.stack(turned, axis=-1).reshape(x.shape)
    return np.concatenate(turned, axis=-1)


def norm(x: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """RMS norm with epsilon 1e-5."""
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5) * weight


def logits(
    arrays: dict[str, np.ndarray], arch: str, ids: list[int], freqs: np.ndarray, length: float = 1.0
) -> np.ndarray:
    """(T, V) float64 logits of the token ids. Yarn makes queries and keys `length` times as long."""
    w = {name: value.astype(np.float64) for name, value in arrays.items()}
    x = w["token_embd.weight"][ids]
    n_rows = len(ids)
    for i in range(LAYERS):

        def apply(name: str, rows: np.ndarray, layer: int = i) -> np.ndarray:
            return rows @ w[f"blk.{layer}.{name}.weight"].T + w.get(f"blk.{layer}.{name}.bias", 0.0)

        h = norm(x, w[f"blk.{i}.attn_norm.weight"])
        q = apply("attn_q", h).reshape(n_rows, HEADS, HEAD_DIM)
        k = apply("attn_k", h).reshape(n_rows, KV_HEADS, HEAD_DIM)
        if arch == "qwen3":
            q, k = (norm(t, w[f"blk.{i}.attn_{p}_norm.weight"]) for t, p in ((q, "q"), (k, "k")))
        q, k = (rope(t, freqs, arch == "llama") * length for t in (q, k))
        v = apply("attn_v", h).reshape(n_rows, KV_HEADS, HEAD_DIM)
        k, v = (np.repeat(t, HEADS // KV_HEADS, axis=1) for t in (k, v))
        scores = np.einsum("thd,shd->hts", q, k) / np.sqrt(HEAD_DIM)
        scores = np.where(np.tril(np.ones((n_rows, n_rows), bool)), scores, -np.inf)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        mixed = np.einsum("hts,shd->thd", weights / weights.sum(-1, keepdims=True), v)
        x = x + apply("attn_output", mixed.reshape(n_rows, -1))
        h = norm(x, w[f"blk.{i}.ffn_norm.weight"])
        gate = apply("ffn_gate", h)
        x = x + apply("ffn_down", gate / (1 + np.exp(-gate)) * apply("ffn_up", h))
    head = w.get("output.weight", w["token_embd.weight"])
    return norm(x, w["output_norm.weight"]) @ head.T
