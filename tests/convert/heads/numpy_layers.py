"""Decoder layers in plain numpy, over PyTorch's own tensor names: an independent oracle for trunks and MTP heads.

Written from the published descriptions of the models, and not from mlx-lm or the converter: kv_b_proj is one matrix,
experts are separate, norms around zero have 1 added where they are used, scales are applied where they stand in
the model. Everything is float64. Legend: T rows, D hidden size, H heads.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

Array = np.ndarray


@dataclass(frozen=True)
class Tensors:
    """Stored tensors below a prefix. plus: what is added to a norm's weight before it is used (0 or 1)."""

    arrays: Mapping[str, Array]
    prefix: str = ""
    plus: float = 0.0
    eps: float = 1e-6

    def __getitem__(self, name: str) -> Array:
        return self.arrays[self.prefix + name].astype(np.float64)

    def __contains__(self, name: str) -> bool:
        return self.prefix + name in self.arrays

    def below(self, prefix: str) -> Tensors:
        return Tensors(self.arrays, self.prefix + prefix, self.plus, self.eps)

    def linear(self, name: str, x: Array) -> Array:
        y = x @ self[f"{name}.weight"].T
        return y + self[f"{name}.bias"] if f"{name}.bias" in self else y

    def norm(self, name: str, x: Array, eps: float | None = None) -> Array:
        scale = 1 / np.sqrt((x**2).mean(-1, keepdims=True) + (self.eps if eps is None else eps))
        return x * scale * (self[f"{name}.weight"] + self.plus)


def silu(x: Array) -> Array:
    return x / (1 + np.exp(-x))


def sigmoid(x: Array) -> Array:
    return 1 / (1 + np.exp(-x))


def softmax(x: Array) -> Array:
    weights = np.exp(x - x.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True)


def rope(x: Array, width: int, base: float, neighbours: bool) -> Array:
    """x [T, H, hd], row t at position t; the first `width` numbers of each head turn, in pairs of neighbours or of
    the two halves."""
    turned, rest = x[..., :width], x[..., width:]
    angles = np.arange(len(x))[:, None, None] * base ** (-np.arange(0, width, 2) / width)
    cos, sin = np.cos(angles), np.sin(angles)
    a, b = (turned[..., ::2], turned[..., 1::2]) if neighbours else np.split(turned, 2, axis=-1)
    pair = a * cos - b * sin, a * sin + b * cos
    turned = np.stack(pair, -1).reshape(turned.shape) if neighbours else np.concatenate(pair, -1)
    return np.concatenate([turned, rest], axis=-1)


def attend(
    q: Array, k: Array, v: Array, scale: float, window: int | None = None, sinks: Array | None = None
) -> Array:
    """q [T, H, hd], k [T, K, hd], v [T, K, vd] -> [T, H, vd]: causal, the newest `window` rows where there is one.

    sinks [H]: logits of a place that takes weight and gives nothing.
    """
    k, v = (np.repeat(x, q.shape[1] // x.shape[1], axis=1) for x in (k, v))
    scores = np.einsum("thd,shd->hts", q, k) * scale
    ages = np.arange(len(q))[:, None] - np.arange(len(q))[None]
    seen = (ages >= 0) & (ages < (window or len(q)))
    scores = np.where(seen, scores, -np.inf)
    if sinks is not None:
        column = np.broadcast_to(sinks[:, None, None], (*scores.shape[:2], 1))
        scores = np.concatenate([scores, column], axis=-1)
    weights = softmax(scores)[..., : len(q)]
    return np.einsum("hts,shd->thd", weights, v)


# --- attention ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class GroupedQueries:
    """Grouped-query attention, `self_attn.*`. Norms of q and k, biases and sinks are there where they are stored.

    rope_width 0: no rotary embedding. gate: "" | "with queries" (Qwen3-Next: each head's query projection makes its
    output gate too) | "per head" (Step-3.5: g_proj).
    """

    heads: int
    kv_heads: int
    head_dim: int
    rope_width: int
    rope_base: float = 10000.0
    neighbours: bool = False
    window: int | None = None
    gate: str = ""
    name: str = "self_attn."

    def __call__(self, t: Tensors, x: Array) -> Array:
        t = t.below(self.name)
        rows = len(x)
        q = t.linear("q_proj", x).reshape(rows, self.heads, -1)
        k = t.linear("k_proj", x).reshape(rows, self.kv_heads, -1)
        v = t.linear("v_proj", x).reshape(rows, self.kv_heads, -1)
        gate = None
        if self.gate == "with queries":
            q, gate = q[..., : self.head_dim], q[..., self.head_dim :]
        if "q_norm.weight" in t:
            q, k = t.norm("q_norm", q), t.norm("k_norm", k)
        if self.rope_width:
            q, k = (rope(y, self.rope_width, self.rope_base, self.neighbours) for y in (q, k))
        sinks = t["attention_sink_bias"] if "attention_sink_bias" in t else None
        mixed = attend(q, k, v, self.head_dim**-0.5, self.window, sinks)
        if gate is not None:
            mixed = mixed * sigmoid(gate)
        if self.gate == "per head":
            mixed = mixed * sigmoid(t.linear("g_proj", x))[..., None]
        return t.linear("o_proj", mixed.reshape(rows, -1))


@dataclass(frozen=True)
class Latent:
    """DeepSeek's latent attention. scaled: LongCat multiplies queries and latent by sqrt(D / their rank).

    eps: of the norms of the two low-rank parts. turned: Kimi K3 has no rotary embedding.
    """

    heads: int
    rank: int
    nope: int
    rope_width: int
    v_dim: int
    rope_base: float = 10000.0
    scaled: bool = False
    name: str = "self_attn."
    eps: float = 1e-6
    out: str = "o_proj"
    turned: bool = True

    def __call__(self, t: Tensors, x: Array) -> Array:
        t = t.below(self.name)
        rows, width = x.shape
        if "q_a_proj.weight" in t:
            low = t.norm("q_a_layernorm", t.linear("q_a_proj", x), self.eps)
            q = t.linear("q_b_proj", low) * ((width / low.shape[1]) ** 0.5 if self.scaled else 1)
        else:
            q = t.linear("q_proj", x)
        q = q.reshape(rows, self.heads, self.nope + self.rope_width)
        both = t.linear("kv_a_proj_with_mqa", x)
        latent, k_rope = both[:, : self.rank], both[:, None, self.rank :]
        latent = t.norm("kv_a_layernorm", latent, self.eps) * (
            (width / self.rank) ** 0.5 if self.scaled else 1
        )
        kv = t.linear("kv_b_proj", latent).reshape(rows, self.heads, self.nope + self.v_dim)
        q_rope = q[..., self.nope :]
        if self.turned:
            q_rope, k_rope = (rope(y, self.rope_width, self.rope_base, True) for y in (q_rope, k_rope))
        k = np.concatenate([kv[..., : self.nope], np.repeat(k_rope, self.heads, axis=1)], axis=-1)
        q = np.concatenate([q[..., : self.nope], q_rope], axis=-1)
        mixed = attend(q, k, kv[..., self.nope :], (self.nope + self.rope_width) ** -0.5)
        if "g_proj.weight" in t:  # a gate for each attention head (Ling 3), or for each number (Kimi K3)
            mixed = mixed * sigmoid(t.linear("g_proj", x)).reshape(rows, self.heads, -1)
        return t.linear(self.out, mixed.reshape(rows, -1))


@dataclass(frozen=True)
class FusedQueries:
    """Ling's grouped-query attention: queries, keys and values are one projection."""

    heads: int
    kv_heads: int
    head_dim: int
    rope_width: int

    def __call__(self, t: Tensors, x: Array) -> Array:
        t = t.below("attention.")
        both = t.linear("query_key_value", x).reshape(len(x), -1, self.head_dim)
        q, k, v = np.split(both, [self.heads, self.heads + self.kv_heads], axis=1)
        q, k = t.norm("query_layernorm", q), t.norm("key_layernorm", k)
        q, k = (rope(y, self.rope_width, 10000.0, False) for y in (q, k))
        return t.linear("dense", attend(q, k, v, self.head_dim**-0.5).reshape(len(x), -1))


# --- MLPs ---------------------------------------------------------------------------------------------------


def gated_mlp(t: Tensors, x: Array) -> Array:
    """down(silu(gate(x)) * up(x))."""
    return t.linear("down_proj", silu(t.linear("gate_proj", x)) * t.linear("up_proj", x))


def squared_mlp(t: Tensors, x: Array) -> Array:
    """down(relu(up(x)) ** 2)."""
    return t.linear("down_proj", np.maximum(t.linear("up_proj", x), 0) ** 2)


def mix(x: Array, weights: Array, chosen: Array, expert: Callable[[int, Array], Array]) -> Array:
    """Sum over each row's chosen experts; weights [T, E], chosen [T, k] indices."""
    out = []
    for row, these in enumerate(chosen):
        parts = [weights[row, e] * expert(int(e), x[row : row + 1])[0] for e in these]
        out.append(np.sum(parts, axis=0))
    return np.array(out)


def best(scores: Array, count: int) -> Array:
    return np.argsort(-scores, axis=-1)[:, :count]


def over_chosen(weights: Array, chosen: Array) -> Array:
    """Weights that sum to 1 over the chosen ones."""
    return weights / np.take_along_axis(weights, chosen, axis=1).sum(1, keepdims=True)


@dataclass(frozen=True)
class SigmoidExperts:
    """DeepSeek's routing: the choice is made with a correction, the weights without it, normalised and scaled.

    Names are those of DeepSeek, GLM, EXAONE and (mlp=squared_mlp, with a latent) Nemotron-H.
    """

    top: int
    scaling: float = 1.0
    mlp: Callable[[Tensors, Array], Array] = gated_mlp

    def __call__(self, t: Tensors, x: Array) -> Array:
        scores = sigmoid(x @ t["gate.weight"].T)
        names = ("gate.e_score_correction_bias", "e_score_correction_bias", "gate.expert_bias")
        name = next(name for name in names if name in t)
        chosen = best(scores + t[name], self.top)
        weights = over_chosen(scores, chosen) * self.scaling
        inner = t.linear("fc1_latent_proj", x) if "fc1_latent_proj.weight" in t else x
        y = mix(inner, weights, chosen, lambda e, row: self.mlp(t.below(f"experts.{e}."), row))
        y = t.linear("fc2_latent_proj", y) if "fc2_latent_proj.weight" in t else y
        shared = t.below("shared_experts.")
        return y + self.mlp(shared, x) if "up_proj.weight" in shared else y


@dataclass(frozen=True)
class SoftmaxExperts:
    """Qwen3-Next's routing: a softmax over all experts, and a shared expert behind a gate of its own (ERNIE: none).

    Experts lie one by one, or all in two tensors with gate and up together.
    """

    top: int
    normalised: bool

    def __call__(self, t: Tensors, x: Array) -> Array:
        weights = softmax(x @ t["gate.weight"].T)
        chosen = best(weights, self.top)
        weights = over_chosen(weights, chosen) if self.normalised else weights
        y = mix(x, weights, chosen, lambda e, row: self._expert(t, e, row))
        if "shared_expert_gate.weight" not in t:
            return y + gated_mlp(t.below("shared_experts."), x)
        return y + sigmoid(t.linear("shared_expert_gate", x)) * gated_mlp(t.below("shared_expert."), x)

    @staticmethod
    def _expert(t: Tensors, e: int, row: Array) -> Array:
        if "experts.gate_up_proj" not in t:
            return gated_mlp(t.below(f"experts.{e}."), row)
        gate, up = np.split(row @ t["experts.gate_up_proj"][e].T, 2, axis=-1)
        return (silu(gate) * up) @ t["experts.down_proj"][e].T


@dataclass(frozen=True)
class StepExperts:
    """Step-3.5's: routed experts packed under `moe`, the shared one beside it."""

    top: int
    scaling: float

    def __call__(self, t: Tensors, x: Array) -> Array:
        moe = t.below("moe.")
        scores = sigmoid(x @ moe["gate.weight"].T)
        chosen = best(scores + moe["router_bias"], self.top)
        weights = over_chosen(scores, chosen) * self.scaling

        def expert(e: int, row: Array) -> Array:
            gate, up = (row @ moe[f"{name}_proj.weight"][e].T for name in ("gate", "up"))
            return (silu(gate) * up) @ moe["down_proj.weight"][e].T

        return mix(x, weights, chosen, expert) + gated_mlp(t.below("share_expert."), x)


# --- layers -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Layer:
    """x + attention(norm(x)), then + mlp(norm(x)). An MLP named "" reads names from the layer itself."""

    attention: Any
    mlp: Callable[[Tensors, Array], Array] = gated_mlp
    mlp_name: str = "mlp."
    second_norm: str = "post_attention_layernorm"

    def __call__(self, t: Tensors, x: Array) -> Array:
        x = x + self.attention(t, t.norm("input_layernorm", x))
        return x + self.mlp(t.below(self.mlp_name), t.norm(self.second_norm, x))


@dataclass(frozen=True)
class Single:
    """x + part(norm(x)): Nemotron-H's layers have one part each, under `mixer`."""

    part: Callable[[Tensors, Array], Array]

    def __call__(self, t: Tensors, x: Array) -> Array:
        return x + self.part(t.below("mixer."), t.norm("norm", x))
