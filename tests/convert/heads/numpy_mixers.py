"""Parts of other layers in plain numpy: gated delta rule, Mamba-2, LongCat's double layer, Kimi K3's experts.

Written from the published descriptions, over PyTorch's own tensor names. Legend: T rows, D hidden size, H heads.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from tests.convert.heads.numpy_layers import (
    Array,
    Tensors,
    best,
    gated_mlp,
    mix,
    over_chosen,
    sigmoid,
    silu,
    softmax,
)


def softplus(x: Array) -> Array:
    return np.log1p(np.exp(-np.abs(x))) + np.maximum(x, 0)


def causal_convolution(t: Tensors, x: Array) -> Array:
    """x [T, C], each channel over its newest rows; silu behind it. Stored [C, 1, kernel]."""
    weight = t["conv1d.weight"][:, 0]
    kernel = weight.shape[1]
    padded = np.vstack([np.zeros((kernel - 1, x.shape[1])), x])
    y = sum(padded[i : i + len(x)] * weight[:, i] for i in range(kernel))
    return silu(y + t["conv1d.bias"] if "conv1d.bias" in t else y)


@dataclass(frozen=True)
class GatedDelta:
    """Linear attention of Qwen3-Next and Qwen3.5, `linear_attn.*`.

    fused: one projection makes queries, keys, values and gates, key head by key head (Qwen3-Next).
    """

    key_heads: int
    value_heads: int
    key_dim: int
    value_dim: int
    fused: bool

    def __call__(self, t: Tensors, x: Array) -> Array:
        t = t.below("linear_attn.")
        qkv, z, b, a = self._fused(t, x) if self.fused else self._separate(t, x)
        rows, keys = len(x), self.key_heads * self.key_dim
        qkv = causal_convolution(t, qkv)
        q = unit(qkv[:, :keys].reshape(rows, self.key_heads, -1)) * self.key_dim**-0.5
        k = unit(qkv[:, keys : 2 * keys].reshape(rows, self.key_heads, -1))
        v = qkv[:, 2 * keys :].reshape(rows, self.value_heads, -1)
        q, k = (np.repeat(y, self.value_heads // self.key_heads, axis=1) for y in (q, k))
        decay = np.exp(-np.exp(t["A_log"]) * softplus(a + t["dt_bias"]))  # [T, H]
        state = np.zeros((self.value_heads, self.value_dim, self.key_dim))
        out = []
        for i in range(rows):
            state = state * decay[i][:, None, None]
            known = np.einsum("hvk,hk->hv", state, k[i])
            state = state + np.einsum("hv,hk->hvk", (v[i] - known) * sigmoid(b[i])[:, None], k[i])
            out.append(np.einsum("hvk,hk->hv", state, q[i]))
        y = np.array(out)
        y = y / np.sqrt((y**2).mean(-1, keepdims=True) + t.eps) * t["norm.weight"]  # never around zero
        y = y * silu(z.reshape(y.shape))
        return t.linear("out_proj", y.reshape(rows, -1))

    def _separate(self, t: Tensors, x: Array) -> tuple[Array, Array, Array, Array]:
        q, z, b, a = (t.linear(f"in_proj_{name}", x) for name in ("qkv", "z", "b", "a"))
        return q, z, b, a

    def _fused(self, t: Tensors, x: Array) -> tuple[Array, Array, Array, Array]:
        rows, share = len(x), self.value_heads // self.key_heads
        both = t.linear("in_proj_qkvz", x).reshape(rows, self.key_heads, -1)
        sizes = np.cumsum([self.key_dim, self.key_dim, share * self.value_dim])
        q, k, v, z = np.split(both, sizes, axis=-1)
        b, a = np.split(t.linear("in_proj_ba", x).reshape(rows, self.key_heads, -1), 2, axis=-1)
        flat = [y.reshape(rows, -1) for y in (q, k, v, z, b, a)]
        return np.concatenate(flat[:3], axis=1), *flat[3:]


def unit(x: Array) -> Array:
    """Vectors of length 1."""
    return x / np.sqrt((x**2).sum(-1, keepdims=True) + 1e-6)


@dataclass(frozen=True)
class Mamba2:
    """Nemotron-H's state-space part."""

    heads: int
    head_dim: int
    groups: int
    state: int

    def __call__(self, t: Tensors, x: Array) -> Array:
        inner, rows = self.heads * self.head_dim, len(x)
        projected = t.linear("in_proj", x)
        gate, mixed, dt = (
            projected[:, :inner],
            projected[:, inner : -self.heads],
            projected[:, -self.heads :],
        )
        mixed = causal_convolution(t, mixed)
        values = mixed[:, :inner].reshape(rows, self.heads, -1)
        b, c = np.split(mixed[:, inner:].reshape(rows, 2 * self.groups, -1), 2, axis=1)
        b, c = (np.repeat(y, self.heads // self.groups, axis=1) for y in (b, c))  # [T, H, N]
        dt = softplus(dt + t["dt_bias"])
        decay = np.exp(-np.exp(t["A_log"]) * dt)
        state = np.zeros((self.heads, self.head_dim, self.state))
        out = []
        for i in range(rows):
            new = np.einsum("hp,hn->hpn", values[i] * dt[i][:, None], b[i])
            state = state * decay[i][:, None, None] + new
            out.append(np.einsum("hpn,hn->hp", state, c[i]) + t["D"][:, None] * values[i])
        y = np.array(out).reshape(rows, -1) * silu(gate)
        grouped = y.reshape(rows, self.groups, -1)
        grouped = grouped / np.sqrt((grouped**2).mean(-1, keepdims=True) + t.eps)
        return t.linear("out_proj", grouped.reshape(rows, -1) * t["norm.weight"])


@dataclass(frozen=True)
class LongcatLayer:
    """Two attentions and two MLPs in a row, with experts beside the second half; some experts do nothing.

    attention: makes the attention of a name.
    """

    attention: Callable[[str], Any]
    experts: int
    top: int
    scaling: float

    def __call__(self, t: Tensors, x: Array) -> Array:
        beside: Array = np.zeros_like(x)
        for i in range(2):
            x = x + self.attention(f"self_attn.{i}.")(t, t.norm(f"input_layernorm.{i}", x))
            h = t.norm(f"post_attention_layernorm.{i}", x)
            if i == 0:
                beside = self._mixture(t.below("mlp."), h)
            x = x + gated_mlp(t.below(f"mlps.{i}."), h)
        return x + beside

    def _mixture(self, t: Tensors, x: Array) -> Array:
        weights = softmax(t.linear("router.classifier", x))
        chosen = best(weights + t["router.e_score_correction_bias"], self.top)
        out = np.zeros_like(x)
        for row, these in enumerate(chosen):
            here = x[row : row + 1]
            for e in these:
                made = gated_mlp(t.below(f"experts.{e}."), here) if e < self.experts else here
                out[row] += self.scaling * weights[row, e] * made[0]
        return out


@dataclass(frozen=True)
class Situ:
    """Kimi K3's MLP: both factors are bent by a tanh; names of gate, up and down.

    beta, linear_beta: how far each goes before it bends.
    """

    beta: float
    linear_beta: float
    names: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")

    def __call__(self, t: Tensors, x: Array) -> Array:
        gate, up = (t.linear(name, x) for name in self.names[:2])
        gate = self.beta * np.tanh(gate / self.beta) * sigmoid(gate)
        return t.linear(self.names[2], gate * self.linear_beta * np.tanh(up / self.linear_beta))


@dataclass(frozen=True)
class KimiExperts:
    """Kimi K3's: DeepSeek's routing, experts on a normalised latent, the shared one on the state itself."""

    top: int
    scaling: float
    mlp: Situ

    def __call__(self, t: Tensors, x: Array) -> Array:
        scores = sigmoid(x @ t["gate.weight"].T)
        chosen = best(scores + t["gate.e_score_correction_bias"], self.top)
        weights = over_chosen(scores, chosen) * self.scaling
        expert = Situ(self.mlp.beta, self.mlp.linear_beta, ("w1", "w3", "w2"))
        inner = t.linear("routed_expert_down_proj", x)
        y = mix(inner, weights, chosen, lambda e, row: expert(t.below(f"experts.{e}."), row))
        y = t.linear("routed_expert_up_proj", t.norm("routed_expert_norm", y))
        return y + self.mlp(t.below("shared_experts."), x)
