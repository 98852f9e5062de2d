"""Configurations of the rest of mlx-lm's architectures, for `tests.tiny`: what they need beyond the common widths.

Every entry is filtered by the fields of that architecture's ModelArgs, so `SHARED` may name the widths that different
families call by different names. `text` is the config inside a multimodal one, which is not filtered.
"""

from __future__ import annotations

from typing import Any

TEXT: dict[str, Any] = {
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 157,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": False,
}

LATENT: dict[str, Any] = {  # DeepSeek's latent attention
    "kv_lora_rank": 16,
    "q_lora_rank": 24,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 12,
    "v_head_dim": 20,
}

ROUTED: dict[str, Any] = {  # mixtures of experts: names of the same few numbers
    **dict.fromkeys(("num_experts", "n_routed_experts", "num_local_experts", "moe_num_experts"), 6),
    **dict.fromkeys(("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_top_k", "moe_k"), 2),
    **dict.fromkeys(("moe_intermediate_size", "expert_ffn_hidden_size", "share_expert_dim"), 40),
    **dict.fromkeys(("shared_expert_intermediate_size", "moe_shared_expert_intermediate_size"), 40),
    **dict.fromkeys(("n_shared_experts", "num_shared_experts", "num_shared_expert"), 1),
    **dict.fromkeys(("n_group", "topk_group", "first_k_dense_replace", "num_dense_layers"), 1),
    **dict.fromkeys(("norm_topk_prob", "use_expert_bias"), True),
    **dict.fromkeys(("moe_layer_freq", "decoder_sparse_step"), 1),
    "routed_scaling_factor": 1.5,
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
    "mlp_only_layers": [],
}

GPT: dict[str, Any] = {  # the names of GPT-2 and its time
    **dict.fromkeys(("n_embd", "d_model", "model_dim", "hidden_dim"), 48),
    **dict.fromkeys(("n_layer", "n_layers", "num_layers", "num_transformer_layers"), 2),
    **dict.fromkeys(("n_head", "n_heads", "num_heads"), 4),
    **dict.fromkeys(("n_positions", "n_ctx", "block_size", "model_max_length"), 4096),
    **dict.fromkeys(("layer_norm_epsilon", "layer_norm_eps", "layernorm_epsilon", "norm_eps"), 1e-5),
    **dict.fromkeys(("n_inner", "ffn_hidden_size", "ff_intermediate_size"), 80),
    **dict.fromkeys(("num_kv_heads", "n_kv_heads"), 2),
}

SHARED: dict[str, Any] = {**TEXT, **LATENT, **ROUTED, **GPT}

_WINDOWS = {"sliding_window": 6, "layer_types": ["sliding_attention", "full_attention"]}
_LINEAR = {  # gated delta rule: see `tests.tiny`
    "num_hidden_layers": 4,
    "full_attention_interval": 2,
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 12,
    "linear_conv_kernel_dim": 4,
    "rope_parameters": {
        "type": "default",
        "mrope_section": [1, 1, 1],
        "rope_theta": 10000,
        "partial_rotary_factor": 0.5,
    },
}
_GEMMA4 = {
    "model_type": "gemma4_text",
    "num_hidden_layers": 5,
    "num_key_value_heads": 1,
    "global_head_dim": 24,
    "vocab_size_per_layer_input": 157,
    "num_kv_shared_layers": 2,
    "hidden_size_per_layer_input": 8,
    "sliding_window": 6,
    "layer_types": [
        "sliding_attention",
        "full_attention",
        "sliding_attention",
        "sliding_attention",
        "full_attention",
    ],
    "rope_parameters": {
        "full_attention": {"partial_rotary_factor": 0.25, "rope_theta": 1e6},
        "sliding_attention": {"rope_theta": 1e4},
    },
}
_LLAMA4 = {"intermediate_size_mlp": 80, "no_rope_layers": [1, 0], "use_qk_norm": True}
_LONGCAT = {
    "attention_method": "MLA",
    "zero_expert_type": "identity",
    "zero_expert_num": 2,
    "mla_scale_q_lora": True,
    "mla_scale_kv_lora": True,
    "attention_bias": False,
}
_BLOCK = {
    "attention": {"n_heads_in_group": 2, "no_op": False, "replace_with_linear": False},
    "ffn": {"ffn_mult": 1.5, "no_op": False, "replace_with_linear": False},
}
_LFM2 = {
    "num_hidden_layers": 3,
    "full_attn_idxs": [2],
    "conv_L_cache": 3,
    "conv_bias": False,
    "norm_eps": 1e-5,
    "block_dim": 48,
    "block_ff_dim": 80,
    "block_multiple_of": 8,
    "block_ffn_dim_multiplier": 1.0,
    "block_auto_adjust_ff_dim": True,
}
_MAMBA = {
    "state_size": 16,
    "conv_kernel": 4,
    "use_bias": False,
    "use_conv_bias": True,
    "time_step_rank": 8,
    "num_heads": 4,
    "head_dim": 20,
    "intermediate_size": 80,
    "n_groups": 2,
    "time_step_limit": (0.01, 10.0),
    "tie_word_embeddings": True,
}
_INDEXER = {"index_head_dim": 16, "index_n_heads": 2, "index_topk": 8}
_KIMI = {
    "num_hidden_layers": 3,
    "linear_attn_config": {
        "num_heads": 4,
        "head_dim": 12,
        "short_conv_kernel_size": 4,
        "kda_layers": [1, 2],
        "full_attn_layers": [3],
    },
}

# What the common widths do not say of each.
FAMILIES: dict[str, dict[str, Any]] = {
    **dict.fromkeys(
        ("bailing_moe", "bitnet", "cohere", "deepseek", "deepseek_v3", "dots1", "gemma", "glm"), {}
    ),
    **dict.fromkeys(
        ("glm4_moe_lite", "gpt2", "gpt_bigcode", "internlm2", "internlm3", "mimo", "mixtral"), {}
    ),
    **dict.fromkeys(
        ("nanbeige", "nanochat", "qwen2_moe", "seed_oss", "starcoder2", "talkie", "youtu_llm"), {}
    ),
    "Klear": {"mlp_only_layers": [0], "attention_bias": False},
    "afm7": {"num_layers": 4, "num_kv_reuse_layers": 2},
    "afmoe": _WINDOWS,
    "apertus": {"mlp_bias": False, "attention_bias": False, "post_norm": True, "qk_norm": True},
    "baichuan_m1": {"sliding_window": 6, "sliding_window_layers": [0], "conv_window": 2},
    "bailing_hybrid": {"num_hidden_layers": 3, "layer_group_size": 3, "group_norm_size": 1},
    "bailing_moe_linear": {"num_hidden_layers": 3, "layer_group_size": 3, "group_norm_size": 1},
    "bailing_moe_v3": {"num_hidden_layers": 3, "layer_group_size": 3},
    "cohere2": {"head_dim": 12, "num_hidden_layers": 3, "sliding_window": 6, "sliding_window_pattern": 3},
    "dbrx": {
        "ffn_config": {"ffn_hidden_size": 80, "moe_num_experts": 6, "moe_top_k": 2},
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0},
    },
    "deepseek_v2": {
        "topk_method": "gready",
        "rope_scaling": {
            "type": "yarn",
            "factor": 2.0,
            "original_max_position_embeddings": 2048,
            "mscale_all_dim": 1.0,
        },
    },
    "deepseek_v32": _INDEXER,
    "deepseek_v41": {"o_groups": 2, "o_lora_rank": 8, "compress_ratios": (0, 0), "sliding_window": 6},
    "ernie4_5_moe": {"use_bias": False, "moe_layer_start_index": 1},
    "exaone": {"head_dim": 12},
    "exaone4": {"sliding_window": 6, "sliding_window_pattern": "LG", "rope_scaling": None},
    "exaone_moe": {**_WINDOWS, "is_moe_layer": [False, True]},
    "falcon_mamba": {**_MAMBA, "use_bcdt_rms": True},
    "gear": {
        "num_hidden_layers": 3,
        "layer_types": ["conv_mixer", "sliding_attention", "full_attention"],
        "sliding_window": 6,
        "query_pre_attn_scalar": 16,
    },
    "gemma3n": {
        "text_config": {
            **TEXT,
            "model_type": "gemma3n",
            "num_hidden_layers": 4,
            "num_kv_shared_layers": 2,
            "vocab_size_per_layer_input": 157,
            "sliding_window": 6,
            "rope_local_base_freq": 10000.0,
            "final_logit_softcapping": 30.0,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
            "activation_sparsity_pattern": [0.5] * 4,
            "hidden_size_per_layer_input": 8,
            "altup_num_inputs": 2,
            "altup_coef_clip": 1.0,
            "altup_correct_scale": True,
            "altup_active_idx": 0,
            "laurel_rank": 8,
        }
    },
    "gemma4": {"text_config": {**TEXT, **_GEMMA4}},
    "gemma4_text": _GEMMA4,
    "glm_moe_dsa": {
        **_INDEXER,
        "attention_bias": False,
        "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},
    },
    "gpt_neox": {"rotary_emb_base": 10000, "rotary_pct": 0.5},
    "gptj": {"rotary_dim": 8},
    "granitemoe": {
        "logits_scaling": 0.5,
        "attention_multiplier": 0.3,
        "embedding_multiplier": 2.0,
        "residual_multiplier": 0.8,
        "attention_bias": False,
    },
    "hunyuan": {
        "attention_bias": False,
        "use_mixed_mlp_moe": True,
        "use_qk_norm": True,
        "use_cla": True,
        "cla_share_factor": 2,
        "rope_scaling": {"alpha": 1000.0, "factor": 1.0, "type": "dynamic"},
    },
    "hunyuan_v1_dense": {"rope_scaling": {"alpha": 1000.0, "factor": 1.0, "type": "dynamic"}},
    "iquestloopcoder": {"loop_num": 2, "loop_window_size": 6},
    "jamba": {
        "num_hidden_layers": 4,
        "attn_layer_offset": 1,
        "attn_layer_period": 2,
        "expert_layer_offset": 1,
        "expert_layer_period": 2,
        "mamba_d_conv": 4,
        "mamba_d_state": 16,
        "mamba_expand": 2,
    },
    "kimi_k25": {"text_config": {**TEXT, **LATENT, **ROUTED, "model_type": "deepseek_v3"}},
    "kimi_k3": {"text_config": {**SHARED, **_KIMI, "model_type": "kimi_linear"}},
    "kimi_linear": _KIMI,
    "kimi_vl": {"text_config": {**TEXT, **LATENT, **ROUTED}},
    "laguna": {
        **_WINDOWS,
        "partial_rotary_factor": 0.5,
        "mlp_layer_types": ["dense", "sparse"],
        "num_attention_heads_per_layer": [4, 4],
        "rope_parameters": {
            "full_attention": {"rope_type": "default", "rope_theta": 1e5, "partial_rotary_factor": 0.5},
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 1.0},
        },
    },
    "lfm2-vl": {"text_config": {**TEXT, **_LFM2, "model_type": "lfm2"}},
    "lfm2_moe": _LFM2,
    "lille-130m": {"n_embd": 64},
    "llama4": {
        "text_config": {
            **TEXT,
            **ROUTED,
            **_LLAMA4,
            "model_type": "llama4",
            "attention_bias": False,
            "attention_chunk_size": 8,
            "interleave_moe_layer_step": 2,
            "num_experts_per_tok": 1,
            "num_hidden_layers": 4,
            "rope_scaling": None,
        }
    },
    "llama4_text": _LLAMA4,
    "longcat_flash": _LONGCAT,
    "longcat_flash_ngram": {
        **_LONGCAT,
        "ngram_vocab_size_ratio": 3,
        "emb_neighbor_num": 2,
        "emb_split_num": 2,
    },
    "mamba": _MAMBA,
    "mamba2": _MAMBA,
    "mellum": {
        **_WINDOWS,
        "rope_parameters": {
            "full_attention": {"rope_type": "default", "rope_theta": 1e5},
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
        },
    },
    "mimo_v2_flash": {
        "hybrid_layer_pattern": [1, 0],
        "moe_layer_freq": [0, 1],
        "add_swa_attention_sink_bias": True,
        "add_full_attention_sink_bias": False,
        "sliding_window_size": 6,
        "swa_rope_theta": 10000.0,
        "swa_num_attention_heads": 4,
        "swa_num_key_value_heads": 2,
        "swa_head_dim": 16,
        "swa_v_head_dim": 20,
        "partial_rotary_factor": 0.5,
    },
    "minicpm": {"dim_model_base": 24, "scale_depth": 1.4, "scale_emb": 2.0},
    "minicpm3": {
        "dim_model_base": 24,
        "scale_depth": 1.4,
        "scale_emb": 2.0,
        "rope_scaling": {
            "type": "longrope",
            "short_factor": [1.0] * 4,
            "long_factor": [1.0] * 4,
            "original_max_position_embeddings": 4096,
        },
    },
    "minimax": {"shared_intermediate_size": 80, "rotary_dim": 8},
    "minimax_m3_vl": {
        "text_config": {
            **TEXT,
            **ROUTED,
            "dense_intermediate_size": 80,
            "shared_intermediate_size": 40,
            "intermediate_size": 40,
            "rotary_dim": 8,
            "moe_layer_freq": [0, 1],
            "sparse_attention_freq": [0, 1],
            "index_n_heads": 2,
            "index_head_dim": 12,
            "index_block_size": 4,
            "index_topk_blocks": 3,
        }
    },
    "mistral3": {"text_config": {**TEXT, "model_type": "llama"}},
    "mistral4": {
        "rope_parameters": {
            "rope_theta": 10000.0,
            "llama_4_scaling_beta": 0.1,
            "original_max_position_embeddings": 8,
        },
    },
    "muse_glimmer": {**_WINDOWS, "layer_rope_theta": [10000.0, 0.0]},
    "muse_spark": {
        "text_config": {
            **TEXT,
            **ROUTED,
            **_WINDOWS,
            "post_norm_eps": 1e-6,
            "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},
            "layer_rope_theta": [10000.0, 0.0],
            "final_logit_softcapping": 20.0,
            "output_multiplier": 0.2,
            "moe_hidden_size": 32,
            "num_shared_experts": 0,
        }
    },
    "nemotron": {"hidden_act": "relu2"},
    "nemotron-nas": {"block_configs": [_BLOCK] * 2},
    "openelm": {
        "ffn_dim_divisor": 8,
        "num_query_heads": [4, 4],
        "num_kv_heads": [2, 2],
        "ffn_multipliers": [1.0, 2.0],
    },
    "phi": {"num_key_value_heads": 4, "partial_rotary_factor": 0.5},
    "phi3small": {
        "vocab_size": 100352,  # its head writes at ids of its own vocabulary
        "dense_attention_every_n_layers": 2,
        "gegelu_limit": 20.0,
        "blocksparse_block_size": 32,
        "blocksparse_num_local_blocks": 2,
        "blocksparse_vert_stride": 2,
    },
    "phimoe": {
        "rope_scaling": {
            "type": "longrope",
            "short_factor": [1.0] * 6,
            "long_factor": [1.0] * 6,
            "short_mscale": 1.0,
            "long_mscale": 1.0,
        }
    },
    "phixtral": {"num_vocab": 157, "rotary_dim": 8},
    "pixtral": {"text_config": {**TEXT, "model_type": "llama"}},
    "plamo": {"n_shared_head": 2},
    "plamo2": {
        "hidden_size_per_head": 12,
        "attention_window_size": 6,
        "mamba_d_state": 16,
        "mamba_num_heads": 4,
    },
    "plamo3": {"window_size": 6, "sliding_window_pattern": 2},
    "qwen": {"num_attention_heads": 4, "kv_channels": 12, "intermediate_size": 160},
    "qwen2_vl": {"text_config": {**TEXT, "model_type": "qwen2"}},
    "qwen3_5_moe": {"text_config": {**TEXT, **ROUTED, **_LINEAR, "model_type": "qwen3_5_moe"}},
    "qwen3_vl": {"text_config": {**TEXT, "model_type": "qwen3"}},
    "qwen3_vl_moe": {"text_config": {**TEXT, **ROUTED, "model_type": "qwen3_moe"}},
    "solar_open": {"partial_rotary_factor": 0.5},
    "spark2_5": {
        **_WINDOWS,
        "rope_parameters": {
            "full_attention": {"rope_type": "default", "rope_theta": 1e5},
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
        },
    },
    "stablelm": {"num_key_value_heads": 4, "use_qkv_bias": True, "partial_rotary_factor": 0.5},
    "step3p5": {
        "num_attention_groups": 2,
        "layer_types": ["sliding_attention", "full_attention"],
        "sliding_window": 6,
        "moe_layers_enum": "1",
        "attention_other_setting": {"num_attention_heads": 4, "num_attention_groups": 2},
    },
    "telechat3": {"rope_scaling": {"rope_type": "default", "rope_theta": 10000.0}},
}
