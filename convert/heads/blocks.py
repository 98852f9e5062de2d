"""The decoder layer inside a head, for each kind of model: stored names and shapes -> those of mlx-lm's layer.

Each function of BLOCKS takes a `Stored` and returns a `Block` whose tensors are exactly the parameters of that
mlx-lm class, made with its `overrides` and `layers`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from mtp_mlx.convert.heads.parts import (
    Stored,
    attention,
    deepseek_experts,
    experts,
    fused_attention,
    indexer,
    is_sparse,
    kimi_experts,
    latent_attention,
    linear,
    ling_experts,
    mlp,
    norms,
    stacked,
)
from mtp_mlx.convert.heads.targets import Block, Target
from mtp_mlx.errors import ConversionError

Builder = Callable[[Stored], Block]
_NEMOTRON_WORDS = {"attention": "*", "full_attention": "*", "moe": "E"}
_NEMOTRON_DEFAULT = "*E"  # what transformers and vLLM take where config.json says nothing


def _block(
    module: str,
    class_name: str,
    targets: list[Target],
    *,
    args: str = "ModelArgs",
    overrides: Any = None,
    window: int | None = None,
    **layer: Any,
) -> Block:
    return Block(module, class_name, args, (layer,), overrides or {}, tuple(targets), window)


def llama(s: Stored) -> Block:
    """Llama's layer."""
    bias = bool(s.config.get("attention_bias"))
    targets = norms(s) + attention(s, bias=bias, out_bias=bias)
    targets += mlp(s, s.number("intermediate_size"), bias=bool(s.config.get("mlp_bias")))
    return _block("llama", "TransformerBlock", targets)


def qwen2(s: Stored) -> Block:
    """Qwen2's layer: biases on q, k and v. MiMo-7B's is the same."""
    module = "mimo" if s.config.get("model_type") == "mimo" else "qwen2"
    targets = norms(s) + attention(s, bias=True) + mlp(s, s.number("intermediate_size"))
    return _block(module, "TransformerBlock", targets)


def qwen3(s: Stored) -> Block:
    """Qwen3's dense layer."""
    targets = norms(s) + attention(s, qk_norm=True) + mlp(s, s.number("intermediate_size"))
    return _block("qwen3", "TransformerBlock", targets)


def qwen3_next(s: Stored) -> Block:
    """The full-attention layer of Qwen3-Next and Qwen3.5/3.6, dense or with experts."""
    bias = bool(s.config.get("attention_bias"))
    targets = norms(s) + attention(s, bias=bias, out_bias=bias, qk_norm=True, gated=True)
    sparse = is_sparse(s)
    if sparse:
        count = s.number("num_experts")
        targets += [s.target("mlp.gate.weight", (count, s.hidden))]
        targets += experts(s, count, s.number("moe_intermediate_size"))
        targets += mlp(s, s.number("shared_expert_intermediate_size"), "mlp.shared_expert")
        targets += [s.target("mlp.shared_expert_gate.weight", (1, s.hidden))]
    else:
        targets += mlp(s, s.number("intermediate_size"))
    # Every interval-th layer of these hybrids attends to the whole text; a head is always such a layer.
    index = int(s.config.get("full_attention_interval") or 4) - 1
    overrides: dict[str, Any] = {} if sparse else {"num_experts": 0}
    if s.config.get("model_type") == "qwen3_next":
        overrides |= {"decoder_sparse_step": 1, "mlp_only_layers": []} if sparse else {}
        return _block("qwen3_next", "Qwen3NextDecoderLayer", targets, overrides=overrides, layer_idx=index)
    return _block(
        "qwen3_5", "DecoderLayer", targets, args="TextModelArgs", overrides=overrides, layer_idx=index
    )


def deepseek_v3(s: Stored) -> Block:
    """DeepSeek-V3's layer, and that of GLM-4.7-Flash."""
    sparse = is_sparse(s)
    inner = deepseek_experts(s) if sparse else mlp(s, s.number("intermediate_size"))
    overrides = {"first_k_dense_replace": 0, "moe_layer_freq": 1} if sparse else {"n_routed_experts": None}
    targets = norms(s) + latent_attention(s) + inner
    flash = s.config.get("model_type") == "glm4_moe_lite"
    module, name = ("glm4_moe_lite", "Glm4MoeLite") if flash else ("deepseek_v3", "DeepseekV3")
    return _block(module, f"{name}DecoderLayer", targets, overrides=overrides, layer_idx=s.layer)


def deepseek_v32(s: Stored) -> Block:
    """DeepSeek-V3.2's layer, and GLM-5's, whose settings of the rotary embedding have other names."""
    block = deepseek_v3(s)
    rope = s.config.get("rope_parameters")
    overrides = dict(block.overrides)
    if s.config.get("model_type") == "glm_moe_dsa" and isinstance(rope, dict):
        overrides |= {"rope_scaling": rope, "rope_theta": rope["rope_theta"]}
        overrides["indexer_rope_interleave"] = bool(s.config.get("indexer_rope_interleave", True))
    targets = [*block.targets, *indexer(s)]
    return _block("deepseek_v32", "DeepseekV32DecoderLayer", targets, overrides=overrides, layer_idx=s.layer)


def ling(s: Stored) -> Block:
    """Ling's layer: grouped queries in 2.0, latent attention in 2.5, and that with an output gate in 3."""
    fused, sparse = s.has("attention.query_key_value.weight"), is_sparse(s)
    gated = s.has("attention.g_proj.weight")
    if fused:
        module, name = "bailing_moe", "BailingMoeDecoderLayer"
        targets = norms(s) + fused_attention(s)
    else:
        module, name = (
            ("bailing_moe_v3", "BailingDecoderLayer") if gated else ("bailing_hybrid", "DecoderLayer")
        )
        targets = norms(s) + latent_attention(s, name="attention", out="dense", bias_key="use_qkv_bias")
        if gated:
            targets += linear(s, "attention.g_proj", s.number("num_attention_heads"), s.hidden)
    if sparse:
        count = int(s.config.get("num_shared_experts") or 0)
        own = s.config.get("moe_shared_expert_intermediate_size")
        width = (own or s.number("moe_intermediate_size")) * count
        shared = own if module == "bailing_hybrid" and own and count else width
        targets += ling_experts(s, "gate.weight" if gated else "gate.gate_proj.weight", shared)
    else:
        targets += mlp(s, s.number("intermediate_size"))
    overrides = {"first_k_dense_replace": 0 if sparse else s.layer + 1}
    if gated:
        return _block(module, name, targets, overrides=overrides, layer_index=s.layer)
    return _block(module, name, targets, overrides=overrides, layer_idx=s.layer)


def kimi_k3(s: Stored) -> Block:
    """Kimi K3's layer with latent attention, which stands apart from the trunk's mixture of residuals."""
    if s.config.get("hidden_act") != "situ":
        raise ConversionError("MTP heads of Kimi Linear are not known; those of Kimi K2 and K3 are")
    targets = norms(s) + latent_attention(s)
    if s.config.get("mla_use_output_gate"):
        width = s.number("num_attention_heads") * s.number("v_head_dim")
        targets += linear(s, "self_attn.g_proj", width, s.hidden)
    sparse = is_sparse(s)
    targets += kimi_experts(s) if sparse else mlp(s, s.number("intermediate_size"))
    overrides = {"attn_res_block_size": None, "first_k_dense_replace": 0 if sparse else s.layer + 1}
    return _block(
        "kimi_k3",
        "KimiK3DecoderLayer",
        targets,
        args="TextArgs",
        overrides=overrides | {"moe_layer_freq": 1},
        layer_idx=s.layer,
    )


def longcat_flash(s: Stored) -> Block:
    """LongCat's head: one dense layer with DeepSeek's attention, not the trunk's double layer."""
    width, d = s.number("ffn_hidden_size", "intermediate_size"), s.hidden
    q_scale = (d / s.number("q_lora_rank")) ** 0.5 if s.config.get("mla_scale_q_lora") else 1
    kv_scale = (d / s.number("kv_lora_rank")) ** 0.5 if s.config.get("mla_scale_kv_lora") else 1
    targets = norms(s) + latent_attention(s, q_scale, kv_scale)
    targets += mlp(s, width, stored="transformer_layer.mlp")
    overrides = {
        "model_type": "deepseek_v3",
        "intermediate_size": width,
        "num_hidden_layers": s.number("num_layers", "num_hidden_layers"),
        "n_routed_experts": None,
    }
    return _block("deepseek_v3", "DeepseekV3DecoderLayer", targets, overrides=overrides, layer_idx=0)


def glm4_moe(s: Stored) -> Block:
    """GLM-4.5's layer."""
    targets = norms(s) + attention(
        s, bias=bool(s.config.get("attention_bias")), qk_norm=bool(s.config.get("use_qk_norm"))
    )
    sparse = is_sparse(s)
    targets += deepseek_experts(s) if sparse else mlp(s, s.number("intermediate_size"))
    overrides = {"first_k_dense_replace": 0} if sparse else {"n_routed_experts": None}
    return _block("glm4_moe", "DecoderLayer", targets, overrides=overrides, layer_idx=s.layer)


def mimo_v2(s: Stored) -> Block:
    """MiMo-V2's head: a dense layer with the sliding-window attention's sizes."""
    if s.has("self_attn.qkv_proj.weight"):
        raise ConversionError(
            "queries, keys and values are one tensor, as in MiMo-V2-Pro, which is not supported; MiMo-V2-Flash is"
        )
    heads = s.number("swa_num_attention_heads")
    sink = s.has("self_attn.attention_sink_bias")
    targets = norms(s, "pre_mlp_layernorm") + attention(
        s,
        heads=heads,
        kv_heads=s.number("swa_num_key_value_heads"),
        head_dim=s.number("swa_head_dim"),
        v_dim=s.number("swa_v_head_dim", "swa_head_dim"),
    )
    targets += mlp(s, s.number("intermediate_size"))
    if sink:
        targets += [s.target("self_attn.attention_sink_bias", (heads,))]
    overrides = {"add_swa_attention_sink_bias": sink}
    return _block(
        "mimo_v2_flash",
        "DecoderLayer",
        targets,
        overrides=overrides,
        window=s.number("sliding_window_size", "sliding_window"),
        is_moe=False,
        is_sliding_window=True,
    )


def ernie4_5(s: Stored) -> Block:
    """ERNIE-4.5's dense layer, also in the heads of its expert models."""
    bias = bool(s.config.get("use_bias"))
    targets = norms(s) + attention(s, bias=bias, out_bias=bias)
    targets += mlp(s, s.number("intermediate_size"), bias=bias)
    overrides = {"model_type": "ernie4_5", "head_dim": s.head_dim}
    return _block("ernie4_5", "DecoderLayer", targets, overrides=overrides)


def exaone_moe(s: Stored) -> Block:
    """EXAONE-MoE's layer. Whether it has a rotary embedding depends on whether any layer of the model has a sliding
    window, so the head's kind of attention is put before those of the trunk, and the head is layer 0."""
    targets = norms(s) + attention(s, qk_norm=True)
    sparse = is_sparse(s)
    if sparse:
        targets += deepseek_experts(s, "num_experts", "num_shared_experts")
    else:
        targets += mlp(s, s.number("intermediate_size"))
    own = s.config.get("mtp_layer_types")
    kind = own[s.index] if isinstance(own, list) and s.index < len(own) else "full_attention"
    overrides = {"layer_types": [kind, *(s.config.get("layer_types") or [])], "is_moe_layer": [sparse]}
    windows = s.config.get("mtp_sliding_windows")
    window = windows[s.index] if isinstance(windows, list) and s.index < len(windows) else None
    if kind != "sliding_attention":
        window = None
    elif not isinstance(window, int) or window < 1:  # 0 stands for the model's
        window = s.number("sliding_window")
    return _block("exaone_moe", "DecoderLayer", targets, overrides=overrides, window=window, layer_idx=0)


def nemotron_h(s: Stored) -> Block:
    """Nemotron-H's head: one layer for each letter of `mtp_hybrid_override_pattern` (* attention, E experts)."""
    pattern = nemotron_pattern(s.config)
    targets: list[Target] = []
    for number, kind in enumerate(pattern):
        part = Stored(s.config, s.names, f"{s.prefix}{s.layer + number}.", s.index, s.layer + number)
        made = [part.target("norm.weight", (s.hidden,))]
        made += _nemotron_attention(part) if kind == "*" else _nemotron_experts(part)
        targets += [
            Target(f"{number}.{t.name}" if len(pattern) > 1 else t.name, t.shape, t.sources, t.step)
            for t in made
        ]
    layers = tuple({"block_type": kind} for kind in pattern)
    return Block("nemotron_h", "NemotronHBlock", "ModelArgs", layers, {}, tuple(targets))


def nemotron_pattern(config: dict[str, Any]) -> str:
    """The letters of a head's layers, which some checkpoints spell as words."""
    pattern = "".join(config.get("mtp_hybrid_override_pattern") or "")
    words = config.get("mtp_layers_block_type") or []
    if not pattern and not words:
        return _NEMOTRON_DEFAULT
    if not pattern and set(words) <= _NEMOTRON_WORDS.keys():
        pattern = "".join(_NEMOTRON_WORDS[word] for word in words)
    if not pattern or set(pattern) - set("*E"):
        raise ConversionError(
            f"config.json: mtp_hybrid_override_pattern is {pattern!r} and mtp_layers_block_type {words!r}; one of "
            "them must give the layers of an MTP head, as * (attention) and E (experts) or as 'attention' and 'moe'"
        )
    return pattern


def _nemotron_attention(s: Stored) -> list[Target]:
    heads, kv_heads = s.number("num_attention_heads"), s.number("num_key_value_heads")
    d, bias = s.hidden, bool(s.config.get("attention_bias"))
    targets = linear(s, "mixer.q_proj", heads * s.head_dim, d, bias)
    for name in ("mixer.k_proj", "mixer.v_proj"):
        targets += linear(s, name, kv_heads * s.head_dim, d, bias)
    return targets + linear(s, "mixer.o_proj", d, heads * s.head_dim, bias)


def _nemotron_experts(s: Stored) -> list[Target]:
    """Experts without a gate projection, on a narrower latent if the model has one."""
    d, count, width = s.hidden, s.number("n_routed_experts"), s.number("moe_intermediate_size")
    latent, bias = s.config.get("moe_latent_size"), bool(s.config.get("mlp_bias"))
    inner = latent or d
    targets = [
        s.target("mixer.gate.weight", (count, d)),
        s.target("mixer.gate.e_score_correction_bias", (count,)),
        stacked(s, "mixer.switch_mlp.fc1.weight", (count, width, inner), "mixer.experts.{}.up_proj.weight"),
        stacked(s, "mixer.switch_mlp.fc2.weight", (count, inner, width), "mixer.experts.{}.down_proj.weight"),
    ]
    if s.config.get("n_shared_experts"):
        shared = s.number("moe_shared_expert_intermediate_size")
        targets += linear(s, "mixer.shared_experts.up_proj", shared, d, bias)
        targets += linear(s, "mixer.shared_experts.down_proj", d, shared, bias)
    if latent:
        targets += linear(s, "mixer.fc1_latent_proj", latent, d, bias)
        targets += linear(s, "mixer.fc2_latent_proj", d, latent, bias)
    return targets


def step3p5(s: Stored) -> Block:
    """Step-3.5's layer; the lists in its configuration go on beyond the trunk's layers to the heads'."""
    kinds = s.config.get("layer_types")
    if kinds and s.layer >= len(kinds):
        raise ConversionError(
            f"config.json: layer_types has only {len(kinds)} entries, and the MTP head is layer {s.layer}; use the "
            "model's own config.json"
        )
    sliding = kinds[s.layer] == "sliding_attention" if kinds else s.layer % 2 == 0
    sizes = (s.config.get("attention_other_setting") if sliding else None) or s.config
    heads, d = sizes["num_attention_heads"], s.hidden
    targets = norms(s) + attention(s, heads=heads, kv_heads=sizes["num_attention_groups"], qk_norm=True)
    if s.config.get("use_head_wise_attn_gate", True):
        targets += linear(s, "self_attn.g_proj", heads, d)
    sparse = is_sparse(s)
    if sparse:
        count, width = s.number("moe_num_experts"), s.number("moe_intermediate_size")
        up, down = (count, width, d), (count, d, width)
        targets += [
            s.target("mlp.gate.gate.weight", (count, d), "moe.gate.weight"),
            s.target("mlp.gate.router_bias", (count,), "moe.router_bias"),
            s.target("mlp.switch_mlp.gate_proj.weight", up, "moe.gate_proj.weight"),
            s.target("mlp.switch_mlp.up_proj.weight", up, "moe.up_proj.weight"),
            s.target("mlp.switch_mlp.down_proj.weight", down, "moe.down_proj.weight"),
            *mlp(s, s.number("share_expert_dim"), "mlp.share_expert", "share_expert"),
        ]
    else:
        targets += mlp(s, s.number("intermediate_size"))
    overrides = {"moe_layers_enum": str(s.layer) if sparse else ""}
    window = int(s.config.get("sliding_window") or 512) if sliding else None  # 512: mlx-lm's default
    return _block(
        "step3p5", "Step3p5DecoderLayer", targets, overrides=overrides, window=window, layer_idx=s.layer
    )


# config.json's model_type -> the layer of its heads.
BLOCKS: dict[str, Builder] = {
    "llama": llama,
    "mistral": llama,
    "qwen2": qwen2,
    "qwen3": qwen3,
    "mimo": qwen2,
    "qwen3_next": qwen3_next,
    "qwen3_5": qwen3_next,
    "qwen3_5_text": qwen3_next,
    "qwen3_5_moe": qwen3_next,
    "qwen3_5_moe_text": qwen3_next,
    "deepseek_v3": deepseek_v3,
    "glm4_moe": glm4_moe,
    "glm4_moe_lite": deepseek_v3,
    "deepseek_v32": deepseek_v32,
    "glm_moe_dsa": deepseek_v32,
    "kimi_k2": deepseek_v3,
    "kimi_k3": kimi_k3,
    "kimi_linear": kimi_k3,  # what K3's language model is called in its configuration
    "bailing_moe": ling,
    "bailing_hybrid": ling,
    "mimo_v2_flash": mimo_v2,
    "mimo_v2": mimo_v2,
    "ernie4_5": ernie4_5,
    "ernie4_5_moe": ernie4_5,
    "exaone_moe": exaone_moe,
    "longcat_flash": longcat_flash,
    "nemotron_h": nemotron_h,
    "step3p5": step3p5,
}
