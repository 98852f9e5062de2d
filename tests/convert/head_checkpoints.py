"""Tiny random checkpoints with MTP heads, one for each family, written from the tensors a right conversion gives.

`CASES` says, independently of the converter, how each family names and stores its heads; `make(case)` draws the
canonical tensors (the block's names and shapes are those of mlx-lm's own layer) and derives the stored ones. All
numbers are multiples of 1/64, so that every step is exact.
"""

from __future__ import annotations

import importlib
import json
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from mlx.utils import tree_flatten

from .checkpoints import write_safetensors

D, V, L = 48, 40, 4
Arrays = dict[str, np.ndarray]


@dataclass
class Case:
    """How a family stores its heads.

    layer: (module of mlx_lm.models, class, class of its arguments, arguments by name for head i).
    names: stored name of fuse, norm_embedding, norm_hidden, norm_out; block: prefix; {n} = L + i or i.
    past_trunk: {n} counts on from the trunk's layers. rename: stored name of a block's tensor.
    """

    family: str
    config: dict[str, Any]
    layer: tuple[str, str, str, Callable[[int], dict[str, Any]]]
    names: dict[str, str]
    block: str
    heads: int = 1
    past_trunk: bool = False
    order: str = "embedding"
    zero_centred: bool = False
    rename: dict[str, str] = field(default_factory=dict)
    copies: dict[str, str] = field(default_factory=dict)  # stored name -> the trunk's tensor it repeats
    own: dict[str, str] = field(default_factory=dict)  # canonical part -> stored name
    trunk: Arrays = field(default_factory=dict)
    fused_experts: bool = False
    stacked_as: str = ""  # experts are stored stacked, under this name
    layer_config: dict[str, Any] = field(default_factory=dict)
    scales: dict[str, float] = field(default_factory=dict)  # factor that the converter multiplies in
    expected: dict[str, Any] = field(default_factory=dict)  # the convention's fields


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
CONV = {"model.layers.0.linear_attn.conv1d.weight": np.ones((8, 1, 4), np.float32)}
FC = {
    "fuse": "mtp.fc",
    "norm_embedding": "mtp.pre_fc_norm_embedding",
    "norm_hidden": "mtp.pre_fc_norm_hidden",
    "norm_out": "mtp.norm",
}
NEXTN = {
    "fuse": "model.layers.{n}.eh_proj",
    "norm_embedding": "model.layers.{n}.enorm",
    "norm_hidden": "model.layers.{n}.hnorm",
    "norm_out": "model.layers.{n}.shared_head.norm",
}
NEXTN_COPIES = {
    "model.layers.{n}.embed_tokens.weight": "model.embed_tokens.weight",
    "model.layers.{n}.shared_head.head.weight": "lm_head.weight",
}


def under(prefix: str, fuse: str, embedding: str, hidden: str, out: str) -> dict[str, str]:
    """Names of the four tensors under one prefix."""
    parts = {"fuse": fuse, "norm_embedding": embedding, "norm_hidden": hidden, "norm_out": out}
    return {key: f"{prefix}{value}" for key, value in parts.items() if value}


MIMO_NAMES = ("input_proj", "token_layernorm", "hidden_layernorm", "final_layernorm")

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
        expected={"recycled_hidden": "raw", "mask_first_position": True},
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
        expected={"mask_first_position": True},
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
        expected={"mask_first_position": True, "recycled_hidden": "normed", "first_hidden": "post-norm"},
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
        },
        "model.mtp_block.{n}.",
        expected={"output_norm": "identity", "recycled_hidden": "raw", "mask_first_position": True},
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
        expected={"embedding": "own"},
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
        expected={"lm_head": "own", "recycled_hidden": "raw"},
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


CASES |= {
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


@dataclass
class Made:
    """A tiny checkpoint: its stored tensors and configuration, and what a right conversion makes of them."""

    stored: Arrays
    config: dict[str, Any]
    canonical: Arrays

    def write(self, folder: Path, **changes: Any) -> Path:
        """As a folder; `changes` are settings to change or (None) to leave out."""
        folder.mkdir(parents=True, exist_ok=True)
        write_safetensors(folder / "model.safetensors", self.stored)
        (folder / "config.json").write_text(json.dumps(self.config | changes))
        return folder


def numbers(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Random multiples of 1/64 in (-1, 1), the same for the same name."""
    draw = np.random.default_rng(zlib.crc32(name.encode())).integers(-63, 64, shape)
    return (draw / 64).astype(np.float32)


def model_config(case: Case) -> dict[str, Any]:
    """The language model's part of the configuration."""
    return case.config.get("text_config") or case.config.get("transformer_layer_config") or case.config


def block_shapes(name: str, i: int) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the parameters of mlx-lm's own layer(s) for head i."""
    case = CASES[name]
    module_name, class_name, args_class, arguments = case.layer
    module = importlib.import_module(f"mlx_lm.models.{module_name}")
    config = {key: value for key, value in (model_config(case) | case.layer_config).items()}
    if case.family == "exaone-moe":
        config |= {"layer_types": config["mtp_layer_types"] + config["layer_types"]}
    args = getattr(module, args_class).from_dict(config)
    shapes: dict[str, tuple[int, ...]] = {}
    for j, extra in enumerate(SEQUENCES.get(name, ({},))):
        layer = getattr(module, class_name)(args, **arguments(i), **extra)
        prefix = f"{j}." if name in SEQUENCES else ""
        shapes |= {prefix + key: value.shape for key, value in tree_flatten(layer.parameters())}
    return shapes


def make(name: str) -> Made:
    """The tiny checkpoint of a case."""
    case = CASES[name]
    trunk_prefix = "backbone.embeddings" if case.family == "nemotron-h" else "model.embed_tokens"
    stored: Arrays = {
        f"{trunk_prefix}.weight": numbers("embed", (V, D)),
        "lm_head.weight": numbers("head", (V, D)),
        "model.norm.weight": numbers("norm", (D,)),
        **case.trunk,
    }
    if case.family == "speculators":
        stored = {}
    canonical: Arrays = {}
    for i in range(case.heads):
        n = L + i if case.past_trunk else i
        for part, stem in case.names.items():
            value = numbers(f"{i}{part}", (D, 2 * D) if part == "fuse" else (D,))
            canonical[f"heads.{i}.{part}.weight"] = value
            stored[stem.format(n=n) + ".weight"] = _head_part(case, part, value)
        for key, shape in block_shapes(name, i).items():
            canonical[f"heads.{i}.block.{key}"] = numbers(f"{i}{key}", shape)
        block = {key: numbers(f"{i}{key}", shape) for key, shape in block_shapes(name, i).items()}
        stored |= {case.block.format(n=n) + key: value for key, value in _store_block(case, block).items()}
        for key, trunk in case.copies.items():
            stored[key.format(n=n)] = stored[trunk].copy()
        for part, key in case.own.items():
            canonical[f"heads.{i}.{part}.weight"] = stored[key.format(n=n)] = numbers(f"{i}{part}", (V, D))
    return Made(stored, case.config, canonical)


def _head_part(case: Case, part: str, value: np.ndarray) -> np.ndarray:
    if part == "fuse" and case.order == "hidden":
        embedding, hidden = value[:, :D], value[:, D:]
        return np.hstack([hidden, embedding])
    return value - 1 if case.zero_centred and part.startswith("norm") else value


def _store_block(case: Case, block: Arrays) -> Arrays:
    """A block as the family stores it."""
    out: Arrays = {}
    for name, value in block.items():
        stem, part = name.rsplit(".", 1)
        if stem.endswith("embed_q"):
            values = block[name.replace("embed_q", "unembed_out")]
            heads = [np.vstack([value[h].T, values[h]]) for h in range(len(value))]
            out[f"{stem.removesuffix('embed_q')}kv_b_proj.{part}"] = np.vstack(heads)
        elif stem.endswith("unembed_out"):
            continue
        elif ".switch_mlp." in name or name.startswith("switch_mlp."):
            out |= _store_experts(case, name, block)
        elif stem.endswith("norm") and case.zero_centred:
            out[name] = value - 1
        else:
            out[name] = value / case.scales.get(stem.rsplit(".", 1)[-1], 1.0)
    for old, new in case.rename.items():
        out = {key.replace(old, new): value for key, value in out.items()}
    return out


def _store_experts(case: Case, name: str, block: Arrays) -> Arrays:
    stem, projection, part = name.rsplit(".", 2)
    if case.stacked_as:
        return {f"{case.stacked_as}.{projection}.{part}": block[name]}
    experts = stem.replace("switch_mlp", "experts")
    if not case.fused_experts:
        projection = {"fc1": "up_proj", "fc2": "down_proj"}.get(projection, projection)
        return {f"{experts}.{e}.{projection}.{part}": value for e, value in enumerate(block[name])}
    if projection == "down_proj":
        return {f"{experts}.down_proj": block[name]}
    if projection == "up_proj":
        return {}
    both = zip(block[name], block[f"{stem}.up_proj.{part}"])
    return {f"{experts}.gate_up_proj": np.stack([np.vstack(pair) for pair in both])}
