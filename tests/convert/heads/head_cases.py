"""How each family of MTP heads names and stores its tensors, written down independently of the converter.

`head_checkpoints` makes tiny checkpoints of these cases.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from tests.convert.heads.head_case import (
    CONV,
    FC,
    LING_NAMES,
    MIMO_NAMES,
    NEXTN,
    NEXTN_COPIES,
    Arrays,
    Case,
    under,
)
from tests.convert.heads.head_configs import BASE, HYBRID, INDEXED, LATENT, LING, ROUTED, L
from tests.convert.heads.kimi_cases import KIMI

__all__ = ["CASES", "SEQUENCES", "Arrays", "Case"]

CASES: dict[str, Case] = {
    "qwen3-next experts": Case(
        "qwen",
        HYBRID | {"model_type": "qwen3_next", "num_nextn_predict_layers": 1},
        ("qwen3_next", "Qwen3NextDecoderLayer", "ModelArgs", lambda i: {"layer_idx": 3}),
        FC,
        "mtp.layers.{n}.",
        zero_centred=True,
        trunk=CONV,
    ),
    "qwen3.5 dense": Case(
        "qwen",
        {
            "model_type": "qwen3_5",
            "text_config": HYBRID
            | {
                "model_type": "qwen3_5_text",
                "num_experts": 0,
                "mtp_num_hidden_layers": 1,
                "attn_output_gate": True,
            },
        },
        ("qwen3_5", "DecoderLayer", "TextModelArgs", lambda i: {"layer_idx": 3}),
        FC,
        "mtp.layers.{n}.",
        zero_centred=True,
        trunk={"model.language_model.layers.0.linear_attn.conv1d.weight": np.ones((8, 1, 4), np.float32)},
    ),
    "qwen3.5 experts, fused": Case(
        "qwen",
        HYBRID | {"model_type": "qwen3_5_moe", "mtp_num_hidden_layers": 1},
        ("qwen3_5", "DecoderLayer", "TextModelArgs", lambda i: {"layer_idx": 3}),
        FC,
        "mtp.layers.{n}.",
        zero_centred=True,
        trunk=CONV,
        fused_experts=True,
    ),
    "deepseek-v3": Case(
        "deepseek-v3",
        BASE | LATENT | ROUTED | {"model_type": "deepseek_v3", "num_nextn_predict_layers": 1},
        ("deepseek_v3", "DeepseekV3DecoderLayer", "ModelArgs", lambda i: {"layer_idx": L + i}),
        NEXTN,
        "model.layers.{n}.",
        past_trunk=True,
        copies=NEXTN_COPIES,
    ),
    "glm-4.5": Case(
        "glm-4.5",
        BASE
        | ROUTED
        | {
            "model_type": "glm4_moe",
            "num_nextn_predict_layers": 1,
            "use_qk_norm": True,
            "attention_bias": True,
            "partial_rotary_factor": 0.5,
            "rope_scaling": None,
        },
        ("glm4_moe", "DecoderLayer", "ModelArgs", lambda i: {"layer_idx": L + i}),
        NEXTN,
        "model.layers.{n}.",
        past_trunk=True,
        copies=NEXTN_COPIES,
    ),
    "glm-4.7-flash": Case(
        "glm-4.5",
        BASE | LATENT | ROUTED | {"model_type": "glm4_moe_lite", "num_nextn_predict_layers": 1},
        ("glm4_moe_lite", "Glm4MoeLiteDecoderLayer", "ModelArgs", lambda i: {"layer_idx": L + i}),
        NEXTN,
        "model.layers.{n}.",
        past_trunk=True,
        copies=NEXTN_COPIES,
    ),
    "deepseek-v3.2": Case(
        "deepseek-v3",
        BASE | LATENT | ROUTED | INDEXED | {"model_type": "deepseek_v32", "num_nextn_predict_layers": 1},
        ("deepseek_v32", "DeepseekV32DecoderLayer", "ModelArgs", lambda i: {"layer_idx": L + i}),
        NEXTN,
        "model.layers.{n}.",
        past_trunk=True,
        copies=NEXTN_COPIES,
    ),
    "glm-5": Case(
        "glm-4.5",
        BASE
        | LATENT
        | ROUTED
        | INDEXED
        | {
            "model_type": "glm_moe_dsa",
            "num_nextn_predict_layers": 1,
            "topk_method": "noaux_tc",
            "scoring_func": "sigmoid",
            "attention_bias": False,
            "rope_parameters": {"rope_theta": 20000.0, "rope_type": "default"},
        },
        ("deepseek_v32", "DeepseekV32DecoderLayer", "ModelArgs", lambda i: {"layer_idx": L + i}),
        NEXTN,
        "model.layers.{n}.",
        past_trunk=True,
        copies=NEXTN_COPIES,
    ),
    "ling 2.0": Case(
        "ling",
        BASE | LING | {"model_type": "bailing_moe", "score_function": "sigmoid", "use_qk_norm": True},
        ("bailing_moe", "BailingMoeDecoderLayer", "ModelArgs", lambda i: {"layer_idx": L + i}),
        LING_NAMES,
        "model.layers.{n}.",
        past_trunk=True,
        rename={"gate.gate_proj": "gate"},
    ),
    "ling 2.5": Case(
        "ling",
        BASE | LATENT | LING | {"model_type": "bailing_hybrid", "head_dim": 12},
        ("bailing_hybrid", "DecoderLayer", "ModelArgs", lambda i: {"layer_idx": L + i}),
        LING_NAMES,
        "model.layers.{n}.",
        past_trunk=True,
        rename={"gate.gate_proj": "gate"},
    ),
    "ling 3": Case(
        "ling",
        BASE | LATENT | LING | {"model_type": "bailing_hybrid", "architectures": ["BailingMoeV3ForCausalLM"]},
        ("bailing_moe_v3", "BailingDecoderLayer", "ModelArgs", lambda i: {"layer_index": L + i}),
        LING_NAMES,
        "model.layers.{n}.",
        past_trunk=True,
    ),
    "llama with own heads": Case(
        "deepseek-v3",
        BASE | {"model_type": "llama", "num_nextn_predict_layers": 2},
        ("llama", "TransformerBlock", "ModelArgs", lambda i: {}),
        NEXTN,
        "model.layers.{n}.",
        heads=2,
        past_trunk=True,
    ),
    "mimo-7b": Case(
        "mimo",
        BASE | {"model_type": "mimo", "num_nextn_predict_layers": 1, "head_dim": None},
        ("mimo", "TransformerBlock", "ModelArgs", lambda i: {}),
        under("model.mtp_layers.{n}.", *MIMO_NAMES),
        "model.mtp_layers.{n}.",
        order="hidden",
    ),
    "mimo-v2": Case(
        "mimo-v2",
        BASE
        | ROUTED
        | {
            "model_type": "mimo_v2_flash",
            "hybrid_layer_pattern": [0, 1, 1, 1],
            "moe_layer_freq": [0, 1, 1, 1],
            "add_swa_attention_sink_bias": True,
            "add_full_attention_sink_bias": False,
            "sliding_window_size": 8,
            "topk_method": "noaux_tc",
            "scoring_func": "sigmoid",
            "layernorm_epsilon": 1e-6,
            "swa_rope_theta": 5000.0,
            "swa_num_attention_heads": 6,
            "swa_num_key_value_heads": 3,
            "v_head_dim": 12,
            "swa_head_dim": 10,
            "swa_v_head_dim": 14,
            "partial_rotary_factor": 0.5,
        },
        (
            "mimo_v2_flash",
            "DecoderLayer",
            "ModelArgs",
            lambda i: {"is_moe": False, "is_sliding_window": True},
        ),
        under("model.mtp.layers.{n}.", "eh_proj", "enorm", "hnorm", "final_layernorm"),
        "model.mtp.layers.{n}.",
        heads=3,
        rename={"post_attention_layernorm": "pre_mlp_layernorm"},
    ),
    "ernie-4.5": Case(
        "ernie-4.5",
        BASE
        | {
            "model_type": "ernie4_5_moe",
            "num_nextn_predict_layers": 1,
            "use_bias": True,
            "moe_num_experts": 4,
        },
        ("ernie4_5", "DecoderLayer", "ModelArgs", lambda i: {}),
        {
            "fuse": "model.mtp_linear_proj.{n}",
            "norm_embedding": "model.mtp_emb_norm.{n}",
            "norm_hidden": "model.mtp_hidden_norm.{n}",
            "norm_out": "model.norm",
        },
        "model.mtp_block.{n}.",
    ),
    "exaone-moe": Case(
        "exaone-moe",
        BASE
        | {
            "model_type": "exaone_moe",
            "num_nextn_predict_layers": 1,
            "moe_intermediate_size": 24,
            "num_experts": 3,
            "num_experts_per_tok": 2,
            "num_shared_experts": 1,
            "sliding_window": 8,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
            "mtp_layer_types": ["sliding_attention"],
            "is_moe_layer": [False, True, True, True],
        },
        ("exaone_moe", "DecoderLayer", "ModelArgs", lambda i: {"layer_idx": 0}),
        FC,
        "mtp.layers.{n}.",
    ),
    "longcat-flash": Case(
        "longcat-flash",
        {
            key: value
            for key, value in (BASE | LATENT).items()
            if key not in ("intermediate_size", "num_hidden_layers")
        }
        | {
            "model_type": "longcat_flash",
            "num_layers": L,
            "ffn_hidden_size": 56,
            "expert_ffn_hidden_size": 24,
            "n_routed_experts": 3,
            "mla_scale_q_lora": True,
            "mla_scale_kv_lora": True,
            "attention_bias": False,
        },
        ("deepseek_v3", "DeepseekV3DecoderLayer", "ModelArgs", lambda i: {"layer_idx": 0}),
        {
            "fuse": "model.mtp.layers.{n}.eh_proj",
            "norm_embedding": "model.mtp.layers.{n}.enorm.m",
            "norm_hidden": "model.mtp.layers.{n}.hnorm.m",
            "norm_out": "model.mtp.norm",
        },
        "model.mtp.layers.{n}.",
        rename={"mlp.": "transformer_layer.mlp."},
        own={"embed_tokens": "model.mtp.embed_tokens.weight"},
        layer_config={"intermediate_size": 56, "num_hidden_layers": L, "n_routed_experts": None},
        scales={"q_a_layernorm": 4.0, "kv_a_layernorm": 2.0},
    ),
    "nemotron-h": Case(
        "nemotron-h",
        BASE
        | ROUTED
        | {
            "model_type": "nemotron_h",
            "num_nextn_predict_layers": 1,
            "mtp_hybrid_override_pattern": "*E",
            "hybrid_override_pattern": "M*ME",
            "attention_bias": False,
            "mamba_num_heads": 4,
            "mamba_head_dim": 8,
            "mamba_proj_bias": False,
            "ssm_state_size": 8,
            "conv_kernel": 4,
            "n_groups": 2,
            "mlp_bias": False,
            "layer_norm_epsilon": 1e-6,
            "use_bias": False,
            "use_conv_bias": True,
            "moe_shared_expert_intermediate_size": 20,
        },
        ("nemotron_h", "NemotronHBlock", "ModelArgs", lambda i: {}),
        {
            "fuse": "mtp.layers.0.eh_proj",
            "norm_embedding": "mtp.layers.0.enorm",
            "norm_hidden": "mtp.layers.0.hnorm",
            "norm_out": "mtp.layers.1.final_layernorm",
        },
        "mtp.layers.",
    ),
    "step-3.5": Case(
        "step-3.5",
        BASE
        | {
            "model_type": "step3p5",
            "num_nextn_predict_layers": 3,
            "num_attention_groups": 2,
            "layer_types": ["full_attention", "sliding_attention"] * 3 + ["full_attention"],
            "attention_other_setting": {"num_attention_heads": 6, "num_attention_groups": 3},
            "moe_layers_enum": "1,2,3",
            "moe_num_experts": 3,
            "moe_top_k": 2,
            "moe_intermediate_size": 24,
            "share_expert_dim": 20,
        },
        ("step3p5", "Step3p5DecoderLayer", "ModelArgs", lambda i: {"layer_idx": L + i}),
        NEXTN | {"norm_out": "model.layers.{n}.transformer.shared_head.norm"},
        "model.layers.{n}.",
        heads=3,
        past_trunk=True,
        zero_centred=True,
        own={"lm_head": "model.layers.{n}.transformer.shared_head.output.weight"},
    ),
    "speculators, qwen3-next": Case(
        "speculators",
        {
            "speculators_model_type": "mtp",
            "transformer_layer_config": HYBRID | {"model_type": "qwen3_next"},
        },
        ("qwen3_next", "Qwen3NextDecoderLayer", "ModelArgs", lambda i: {"layer_idx": 3}),
        under("mtp_layers.{n}.", *MIMO_NAMES),
        "mtp_layers.{n}.",
        zero_centred=True,
        fused_experts=True,
    ),
    "speculators, qwen3": Case(
        "speculators",
        {"speculators_model_type": "mtp", "transformer_layer_config": BASE | {"model_type": "qwen3"}},
        ("qwen3", "TransformerBlock", "ModelArgs", lambda i: {}),
        under("mtp_layers.{n}.", *MIMO_NAMES),
        "mtp_layers.{n}.",
    ),
}


def variant(name: str, settings: dict[str, Any], **changes: Any) -> Case:
    """The case `name` with other settings."""
    case = CASES[name]
    return replace(case, config=case.config | settings, **changes)


CASES |= KIMI | {
    "fastmtp": variant(
        "mimo-7b",
        {"num_speculative_steps": 3, "mtp_loss_step_weights": [0.51, 0.31, 0.18]},
        family="fastmtp",
    ),
    "qwen3-next dense": variant("qwen3-next experts", {"num_experts": 0}),
    "deepseek-v3 dense": variant("deepseek-v3", {"n_routed_experts": None}),
    "deepseek-v3 without low-rank queries": variant(
        "deepseek-v3", {"q_lora_rank": None, "attention_bias": True}
    ),
    "glm-4.5 dense": variant(
        "glm-4.5", {"first_k_dense_replace": 9, "use_qk_norm": False, "attention_bias": False}
    ),
    "exaone-moe experts": variant(
        "exaone-moe",
        {"is_moe_layer": [True] * L, "mtp_layer_types": ["full_attention"]},
        rename={"mlp.gate.e_score_correction_bias": "mlp.e_score_correction_bias"},
    ),
    "step-3.5 experts": variant(
        "step-3.5",
        {"moe_layers_enum": "1,2,3,4,5,6", "use_head_wise_attn_gate": False},
        rename={
            "mlp.gate.gate.": "moe.gate.",
            "mlp.gate.router_bias": "moe.router_bias",
            "mlp.share_expert.": "share_expert.",
        },
        stacked_as="moe",
    ),
    "nemotron-h with a latent": variant("nemotron-h", {"moe_latent_size": 32, "attention_bias": True}),
    "mimo-v2 without sinks": variant("mimo-v2", {"add_swa_attention_sink_bias": False}),
    "ernie-4.5 without biases": variant("ernie-4.5", {"use_bias": False, "model_type": "ernie4_5"}),
}

# Case -> the layers of a head, where it has several.
_PAIR = ({"block_type": "*"}, {"block_type": "E"})
SEQUENCES = {"nemotron-h": _PAIR, "nemotron-h with a latent": _PAIR}
