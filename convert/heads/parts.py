"""The parts of a decoder layer in a head (attention, MLP, experts): stored names and shapes -> mlx-lm's.

Each function takes a `Stored` (configuration, names, place of the block) and returns the tensors of one part. What
the configuration does not tell (dense or experts, fused or separate experts) the stored names do.

Legend: D hidden size, H heads, E experts.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import numpy as np

from mtp_mlx.convert.heads.targets import AS_IT_IS, STACK, Shape, Step, Target, half, scaled
from mtp_mlx.errors import ConversionError


@dataclass(frozen=True)
class Stored:
    """A head's block as stored.

    Attributes:
        config: the language model's configuration.
        names: every name in the checkpoint.
        prefix: what the block's names begin with.
        index: number of the head. layer: number of its layer in the file.
    """

    config: dict[str, Any]
    names: Collection[str]
    prefix: str
    index: int
    layer: int

    def number(self, *keys: str) -> int:
        """The first of these settings that the configuration has as a whole number."""
        for key in keys:
            value = self.config.get(key)
            if isinstance(value, int):
                return value
        raise ConversionError(
            f"the configuration lacks '{keys[0]}', so the shape of an MTP head is unknown; put the model's "
            "config.json beside the weights"
        )

    def has(self, name: str) -> bool:
        """Whether the block holds a tensor of this name."""
        return self.prefix + name in self.names

    def target(
        self,
        name: str,
        shape: Shape,
        stored: str = "",
        step: Step = AS_IT_IS,
        stored_shape: Shape | None = None,
    ) -> Target:
        """The canonical tensor `name`, made of the stored tensor `stored` (default: the same name)."""
        return Target(name, shape, ((self.prefix + (stored or name), stored_shape or shape),), step)

    @property
    def hidden(self) -> int:
        """D."""
        return self.number("hidden_size", "dim")

    @property
    def head_dim(self) -> int:
        """Width of an attention head."""
        if isinstance(self.config.get("head_dim"), int):
            return self.number("head_dim")
        return self.hidden // self.number("num_attention_heads")


def linear(s: Stored, name: str, out: int, width: int, bias: bool = False) -> list[Target]:
    targets = [s.target(f"{name}.weight", (out, width))]
    return targets + [s.target(f"{name}.bias", (out,))] if bias else targets


def norms(s: Stored, second: str = "post_attention_layernorm") -> list[Target]:
    """The layer's two norms; `second` is the stored name of the one before the MLP."""
    shape = (s.hidden,)
    return [
        s.target("input_layernorm.weight", shape),
        s.target("post_attention_layernorm.weight", shape, f"{second}.weight"),
    ]


def attention(
    s: Stored,
    *,
    heads: int | None = None,
    kv_heads: int | None = None,
    head_dim: int | None = None,
    v_dim: int | None = None,
    bias: bool = False,
    out_bias: bool = False,
    qk_norm: bool = False,
    gated: bool = False,
) -> list[Target]:
    """Grouped-query attention; `gated`: the query projection also makes an output gate (Qwen3-Next)."""
    heads = heads or s.number("num_attention_heads")
    kv_heads = kv_heads or s.config.get("num_key_value_heads") or heads
    head_dim, d = head_dim or s.head_dim, s.hidden
    v_dim = v_dim or head_dim
    targets = linear(s, "self_attn.q_proj", heads * head_dim * (2 if gated else 1), d, bias)
    targets += linear(s, "self_attn.k_proj", kv_heads * head_dim, d, bias)
    targets += linear(s, "self_attn.v_proj", kv_heads * v_dim, d, bias)
    targets += linear(s, "self_attn.o_proj", d, heads * v_dim, out_bias)
    if qk_norm:
        targets += [s.target(f"self_attn.{x}_norm.weight", (head_dim,)) for x in "qk"]
    return targets


def fused_attention(s: Stored) -> list[Target]:
    """Ling's grouped-query attention, whose queries, keys and values are one projection."""
    heads, kv_heads = s.number("num_attention_heads"), s.number("num_key_value_heads")
    width = s.hidden // heads
    rows = (heads + 2 * kv_heads) * width
    targets = linear(s, "attention.query_key_value", rows, s.hidden, bool(s.config.get("use_qkv_bias")))
    targets += linear(s, "attention.dense", s.hidden, heads * width, bool(s.config.get("use_bias")))
    if s.config.get("use_qk_norm"):
        targets += [s.target(f"attention.{x}_layernorm.weight", (width,)) for x in ("query", "key")]
    return targets


def latent_attention(
    s: Stored,
    q_scale: float = 1,
    kv_scale: float = 1,
    *,
    name: str = "self_attn",
    out: str = "o_proj",
    bias_key: str = "attention_bias",
) -> list[Target]:
    """DeepSeek's latent attention. mlx-lm splits kv_b_proj into two stacks with a matrix for each attention head; the
    scales are multiplied into the two low-rank norms. name, out: of the attention and of its last projection."""
    d, heads = s.hidden, s.number("num_attention_heads")
    rank, rope = s.number("kv_lora_rank"), s.number("qk_rope_head_dim")
    nope, v_dim = s.number("qk_nope_head_dim"), s.number("v_head_dim")
    bias = bool(s.config.get(bias_key))
    targets: list[Target] = []
    q_rank = s.config.get("q_lora_rank")
    if q_rank is None:
        targets += linear(s, f"{name}.q_proj", heads * (nope + rope), d)
    else:
        targets += linear(s, f"{name}.q_a_proj", q_rank, d, bias)
        targets += [s.target(f"{name}.q_a_layernorm.weight", (q_rank,), step=_scale(q_scale))]
        targets += linear(s, f"{name}.q_b_proj", heads * (nope + rope), q_rank)
    targets += linear(s, f"{name}.kv_a_proj_with_mqa", rank + rope, d, bias)
    targets += [s.target(f"{name}.kv_a_layernorm.weight", (rank,), step=_scale(kv_scale))]
    if s.has(f"{name}.embed_q.weight"):  # mlx-lm's own form
        targets += [
            s.target(f"{name}.embed_q.weight", (heads, rank, nope)),
            s.target(f"{name}.unembed_out.weight", (heads, v_dim, rank)),
        ]
        return targets + linear(s, f"{name}.{out}", d, heads * v_dim, bias)
    stored, stored_shape = f"{name}.kv_b_proj.weight", (heads * (nope + v_dim), rank)

    def keys(arrays: Any) -> np.ndarray:
        return arrays[0].reshape(heads, nope + v_dim, rank)[:, :nope].swapaxes(1, 2)

    def values(arrays: Any) -> np.ndarray:
        return arrays[0].reshape(heads, nope + v_dim, -1)[:, nope:]

    targets += [
        s.target(
            f"{name}.embed_q.weight",
            (heads, rank, nope),
            stored,
            Step("key rows of each head, transposed", bits=keys),
            stored_shape,
        ),
        s.target(
            f"{name}.unembed_out.weight",
            (heads, v_dim, rank),
            stored,
            Step("value rows of each head", bits=values, packed=True),
            stored_shape,
        ),
    ]
    return targets + linear(s, f"{name}.{out}", d, heads * v_dim, bias)


def _scale(factor: float) -> Step:
    return AS_IT_IS if factor == 1 else scaled(factor)


def mlp(s: Stored, width: int, name: str = "mlp", stored: str = "", bias: bool = False) -> list[Target]:
    """Gate, up and down projections, stored below `stored` (default: the same name)."""
    targets = []
    for part, shape in (
        ("gate_proj", (width, s.hidden)),
        ("up_proj", (width, s.hidden)),
        ("down_proj", (s.hidden, width)),
    ):
        targets.append(s.target(f"{name}.{part}.weight", shape, f"{stored or name}.{part}.weight"))
        if bias:
            targets.append(s.target(f"{name}.{part}.bias", shape[:1], f"{stored or name}.{part}.bias"))
    return targets


def experts(s: Stored, count: int, width: int) -> list[Target]:
    """The routed experts, stacked as in mlx-lm; in the file they are separate, stacked, or gate and up are fused."""
    up, down = (count, width, s.hidden), (count, s.hidden, width)
    if s.has("mlp.experts.gate_up_proj"):
        fused, fused_shape = "mlp.experts.gate_up_proj", (count, 2 * width, s.hidden)
        return [
            s.target("mlp.switch_mlp.gate_proj.weight", up, fused, half(0), fused_shape),
            s.target("mlp.switch_mlp.up_proj.weight", up, fused, half(1), fused_shape),
            s.target("mlp.switch_mlp.down_proj.weight", down, "mlp.experts.down_proj"),
        ]
    shapes = {"gate_proj": up, "up_proj": up, "down_proj": down}
    if s.has("mlp.switch_mlp.gate_proj.weight"):
        return [s.target(f"mlp.switch_mlp.{part}.weight", shape) for part, shape in shapes.items()]
    return [
        stacked(s, f"mlp.switch_mlp.{part}.weight", shape, "mlp.experts.{}." + f"{part}.weight")
        for part, shape in shapes.items()
    ]


def stacked(s: Stored, name: str, shape: Shape, stored: str) -> Target:
    """The canonical tensor `name` [E, ...], stacked from one tensor for each expert; {} in `stored` is its number."""
    if not 0 < shape[0] <= len(s.names):
        raise ConversionError(
            f"the configuration says {shape[0]:,} experts, too many for {len(s.names):,} tensors; use the model's "
            "own config.json"
        )
    sources = tuple((s.prefix + stored.format(e), shape[1:]) for e in range(shape[0]))
    return Target(name, shape, sources, STACK)


def deepseek_experts(
    s: Stored, count_key: str = "n_routed_experts", shared_key: str = "n_shared_experts"
) -> list[Target]:
    count, width = s.number(count_key), s.number("moe_intermediate_size")
    bias = "mlp.gate.e_score_correction_bias"
    if s.has("mlp.e_score_correction_bias"):  # EXAONE
        bias = "mlp.e_score_correction_bias"
    targets = [
        s.target("mlp.gate.weight", (count, s.hidden)),
        s.target("mlp.gate.e_score_correction_bias", (count,), bias),
        *experts(s, count, width),
    ]
    shared = s.config.get(shared_key)
    return targets + mlp(s, width * shared, "mlp.shared_experts") if shared else targets


def indexer(s: Stored) -> list[Target]:
    """DeepSeek-V3.2's choice of the rows that latent attention sees, which counts in texts of thousands of tokens."""
    width, heads, name = s.number("index_head_dim"), s.number("index_n_heads"), "self_attn.indexer"
    return [
        *linear(s, f"{name}.wq_b", heads * width, s.number("q_lora_rank")),
        *linear(s, f"{name}.wk", width, s.hidden),
        s.target(f"{name}.k_norm.weight", (width,)),
        s.target(f"{name}.k_norm.bias", (width,)),
        *linear(s, f"{name}.weights_proj", heads, s.hidden),
    ]


def ling_experts(s: Stored, gate: str, shared: int) -> list[Target]:
    """Ling's routed experts and the shared ones, of the width `shared` (0: none); gate: the router in mlx-lm."""
    count, width = s.number("num_experts"), s.number("moe_intermediate_size")
    stored = f"mlp.{gate}" if s.has(f"mlp.{gate}") else "mlp.gate.weight"
    targets = [s.target(f"mlp.{gate}", (count, s.hidden), stored), *experts(s, count, width)]
    if s.has("mlp.gate.expert_bias"):
        targets.append(s.target("mlp.gate.expert_bias", (count,)))
    return targets + mlp(s, shared, "mlp.shared_experts") if shared else targets


def kimi_experts(s: Stored) -> list[Target]:
    """Kimi K3's routed experts, on a narrower latent if the model has one, and the shared ones."""
    count, width, name = s.number("num_experts"), s.number("moe_intermediate_size"), "block_sparse_moe"
    latent, shared = s.config.get("routed_expert_hidden_size"), s.config.get("num_shared_experts")
    inner, d = latent or s.hidden, s.hidden
    shapes = {"gate_proj": (width, inner), "down_proj": (inner, width), "up_proj": (width, inner)}
    names = zip(shapes, ("w1", "w2", "w3"), strict=True)
    targets = [
        s.target("mlp.gate.weight", (count, d), f"{name}.gate.weight"),
        s.target("mlp.e_score_correction_bias", (count,), f"{name}.gate.e_score_correction_bias"),
        *(
            stacked(s, f"mlp.switch_mlp.{p}.weight", (count, *shapes[p]), f"{name}.experts.{{}}.{w}.weight")
            for p, w in names
        ),
    ]
    if latent:
        for part, shape in (("down", (latent, d)), ("up", (d, latent))):
            stored = f"{name}.routed_expert_{part}_proj.weight"
            targets.append(s.target(f"mlp.routed_expert_{part}_proj.weight", shape, stored))
        if s.config.get("latent_moe_use_norm"):
            stored = f"{name}.routed_expert_norm.weight"
            targets.append(s.target("mlp.routed_expert_norm.weight", (latent,), stored))
    return targets + (
        mlp(s, width * shared, "mlp.shared_experts", f"{name}.shared_experts") if shared else []
    )


def is_sparse(s: Stored) -> bool:
    """Whether the block's MLP has experts, told by the stored names."""
    names = ("mlp.experts.", "mlp.switch_mlp.", "mlp.gate.", "moe.", "block_sparse_moe.")
    marks = tuple(s.prefix + name for name in names)
    return any(name.startswith(marks) for name in s.names)
