"""How Kimi's heads are stored: K2's as DeepSeek-V3's, K3's beside them with its own layer.

Neither was released with heads. The names are those that vLLM and RTP-LLM read.
"""

from __future__ import annotations

from tests.convert.heads.head_case import NEXTN, NEXTN_COPIES, Case
from tests.convert.heads.head_configs import BASE, LATENT, ROUTED, L

_MOE = "block_sparse_moe"
_K3 = {
    "model_type": "kimi_k3",
    "num_nextn_predict_layers": 1,
    "hidden_act": "situ",
    "activation_situ_beta": 2.0,
    "activation_situ_linear_beta": 3.0,
    "attn_res_block_size": None,
    "mla_use_nope": True,
    "mla_use_output_gate": True,
    "num_experts": 3,
    "num_experts_per_token": 2,
    "num_shared_experts": 1,
    "moe_intermediate_size": 24,
    "routed_expert_hidden_size": 20,
    "latent_moe_use_norm": True,
    "routed_scaling_factor": 2.5,
    "first_k_dense_replace": 1,
    "linear_attn_config": {
        "kda_layers": [],
        "full_attn_layers": [1, 2, 3, 4],
        "num_heads": 4,
        "head_dim": 8,
        "short_conv_kernel_size": 4,
    },
}
KIMI: dict[str, Case] = {
    "kimi-k2": Case(
        "deepseek-v3",
        BASE | LATENT | ROUTED | {"model_type": "kimi_k2", "num_nextn_predict_layers": 1},
        ("deepseek_v3", "DeepseekV3DecoderLayer", "ModelArgs", lambda i: {"layer_idx": L + i}),
        NEXTN,
        "model.layers.{n}.",
        past_trunk=True,
        copies=NEXTN_COPIES,
    ),
    "kimi-k3": Case(
        "kimi-k3",
        BASE | LATENT | _K3,
        ("kimi_k3", "KimiK3DecoderLayer", "TextArgs", lambda i: {"layer_idx": L + i}),
        NEXTN,
        "model.layers.{n}.",
        past_trunk=True,
        copies=NEXTN_COPIES,
        rename={
            "mlp.experts.": f"{_MOE}.experts.",
            "mlp.shared_experts.": f"{_MOE}.shared_experts.",
            "mlp.routed_expert_": f"{_MOE}.routed_expert_",
            "mlp.e_score_correction_bias": f"{_MOE}.gate.e_score_correction_bias",
            "mlp.gate.": f"{_MOE}.gate.",
            **{
                f".experts.{e}.{part}": f".experts.{e}.{name}"
                for e in range(3)
                for part, name in (("gate_proj", "w1"), ("down_proj", "w2"), ("up_proj", "w3"))
            },
        },
    ),
}
