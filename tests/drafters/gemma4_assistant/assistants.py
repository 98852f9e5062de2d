"""A tiny Gemma 4, and random assistants for it under the names of the released checkpoints. Plain numpy."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from tests.convert.checkpoints import write_safetensors

V, D, A, WINDOW = 160, 48, 32, 6  # vocabulary, widths of the model and of the assistant, rows of its window
HEADS, HEAD, WIDE, MLP, CLUSTERS, SCORED = 4, 16, 24, 40, 16, 5
KINDS = ["sliding_attention", "sliding_attention", "sliding_attention", "full_attention"]
ROPE = {
    "full_attention": {"partial_rotary_factor": 0.25, "rope_theta": 1e6, "rope_type": "proportional"},
    "sliding_attention": {"rope_theta": 1e4, "rope_type": "default"},
}
# Of `tests.tiny`: five layers, two of which read the keys of others; the assistant reads those of layers 2 and 1.
TARGET: dict[str, Any] = {"vocab_size": V, "vocab_size_per_layer_input": V, "rope_parameters": ROPE}
READS = {"sliding_attention": 2, "full_attention": 1}
CONFIG: dict[str, Any] = {
    "architectures": ["Gemma4AssistantForCausalLM"],
    "model_type": "gemma4_assistant",
    "backbone_hidden_size": D,
    "num_centroids": CLUSTERS,
    "centroid_intermediate_top_k": SCORED,
    "use_ordered_embeddings": False,
    "tie_word_embeddings": True,
    "text_config": {
        "model_type": "gemma4_text",
        "attention_bias": False,
        "attention_k_eq_v": False,
        "enable_moe_block": False,
        "final_logit_softcapping": None,
        "global_head_dim": WIDE,
        "head_dim": HEAD,
        "hidden_size": A,
        "hidden_size_per_layer_input": 0,
        "intermediate_size": MLP,
        "layer_types": KINDS,
        "max_position_embeddings": 4096,
        "num_attention_heads": HEADS,
        "num_hidden_layers": 4,
        "num_key_value_heads": 1,
        "num_kv_shared_layers": 4,
        "rms_norm_eps": 1e-6,
        "rope_parameters": ROPE,
        "sliding_window": WINDOW,
        "use_double_wide_mlp": False,
        "vocab_size": V,
        "vocab_size_per_layer_input": 0,
    },
}
Arrays = dict[str, np.ndarray]


def tensors(centroids: bool = False, seed: int = 0) -> Arrays:
    """A random assistant; attention is sharp enough that every row it sees shows in its logits."""
    rng = np.random.default_rng(seed)

    def matrix(rows: int, columns: int, gain: float = 1.0) -> np.ndarray:
        return (gain * rng.normal(size=(rows, columns)) / columns**0.5).astype(np.float32)

    def norm(size: int) -> np.ndarray:
        return (1 + 0.1 * rng.normal(size=size)).astype(np.float32)

    made = {
        "pre_projection.weight": matrix(A, 2 * D, 3.0),
        "post_projection.weight": matrix(D, A, 3.0),
        "model.embed_tokens.weight": matrix(V, A),
        "model.norm.weight": norm(A),
    }
    for index, kind in enumerate(KINDS):
        width = HEADS * (WIDE if kind == "full_attention" else HEAD)
        layer: Arrays = {
            "self_attn.q_proj.weight": matrix(width, A, 3.0),
            "self_attn.o_proj.weight": matrix(A, width, 3.0),
            "self_attn.q_norm.weight": 2 * norm(width // HEADS),
            "mlp.gate_proj.weight": matrix(MLP, A),
            "mlp.up_proj.weight": matrix(MLP, A),
            "mlp.down_proj.weight": matrix(A, MLP),
            "layer_scalar": np.full(1, 0.8, np.float32),
        }
        for name in ("input", "post_attention", "pre_feedforward", "post_feedforward"):
            layer[f"{name}_layernorm.weight"] = norm(A)
        made |= {f"model.layers.{index}.{name}": value for name, value in layer.items()}
    if centroids:
        made["masked_embedding.centroids.weight"] = matrix(CLUSTERS, A)
        made["masked_embedding.token_ordering"] = rng.permutation(V).astype(np.int64)
    return made


def assistant_folder(folder: Path, made: Arrays, **changes: Any) -> Path:
    """A checkpoint of these tensors as it is released; `changes` to its configuration."""
    folder.mkdir(parents=True)
    packed = {name: "U32" for name, value in made.items() if value.dtype == np.uint32}
    write_safetensors(folder / "model.safetensors", made, packed)
    ordered = {"use_ordered_embeddings": "masked_embedding.token_ordering" in made}
    (folder / "config.json").write_text(json.dumps({**CONFIG, **ordered, **changes}))
    return folder
