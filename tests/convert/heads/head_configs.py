"""Settings of tiny models, shared by the cases of MTP heads. The sizes all differ, so a swapped dimension fails."""

from __future__ import annotations

from typing import Any

D, V, L = 48, 40, 4  # hidden size, vocabulary, layers of the trunk

BASE: dict[str, Any] = {
    "hidden_size": D,
    "intermediate_size": 56,
    "num_hidden_layers": L,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": V,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
}
HYBRID = BASE | {
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_conv_kernel_dim": 4,
    "full_attention_interval": 4,
    "partial_rotary_factor": 0.25,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "num_experts": 3,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "shared_expert_intermediate_size": 20,
}
LATENT = {
    "kv_lora_rank": 12,
    "q_lora_rank": 3,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 10,
    "v_head_dim": 14,
}
ROUTED = {
    "n_routed_experts": 3,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "first_k_dense_replace": 1,
    "moe_layer_freq": 1,
    "n_group": 1,
    "topk_group": 1,
    "norm_topk_prob": True,
    "routed_scaling_factor": 1.0,
}
INDEXED = {"index_head_dim": 16, "index_n_heads": 3, "index_topk": 64}
LING = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "num_shared_experts": 1,
    "moe_intermediate_size": 24,
    "moe_shared_expert_intermediate_size": 20,
    "moe_router_enable_expert_bias": True,
    "norm_topk_prob": True,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
    "routed_scaling_factor": 2.5,
    "partial_rotary_factor": 0.5,
    "layer_group_size": 1,
    "group_norm_size": 1,
    "use_qk_norm": True,
    "num_nextn_predict_layers": 1,
}
