"""Tiny random mlx-lm models and a tiny tokenizer, for tests of everything.

    model = tiny_model("qwen3", seed=3)            a random model of that mlx-lm architecture
    tokenizer = tiny_tokenizer()                   the same 157 ids, ChatML template with a system prompt
    save_tiny(tmp_path, "gemma2")                  a folder that `mlx_lm.load` loads

All widths differ (hidden 48, attention 4 x 16 = 64, key-value 2 x 16 = 32, MLP 80, vocabulary 157), so a
swapped dimension fails. qwen2, phi3 and granite have no head_dim of their own: 4 x 12 = 48 there. Quantising
needs widths that are multiples of 32: pass hidden_size=64, intermediate_size=96.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import zlib
from functools import lru_cache
from pathlib import Path
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten
from mlx_lm.tokenizer_utils import BPEStreamingDetokenizer, TokenizerWrapper
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from tests.families import FAMILIES, SHARED

VOCABULARY = 157

COMMON: dict[str, Any] = {
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": VOCABULARY,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "mlp_bias": False,
    "rope_scaling": None,
}

EXPERTS: dict[str, Any] = {"num_experts": 6, "num_experts_per_tok": 2, "norm_topk_prob": True}

SPECIFIC: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {},
    "qwen2": {},
    "qwen3": {},
    "olmo2": {},
    "phi3": {},
    "gemma2": {"query_pre_attn_scalar": 16},
    "smollm3": {"num_hidden_layers": 3, "no_rope_layer_interval": 2},
    "granite": {
        "logits_scaling": 0.5,
        "attention_multiplier": 0.3,
        "embedding_multiplier": 2.0,
        "residual_multiplier": 0.8,
    },
    "glm4": {"partial_rotary_factor": 0.5, "attention_bias": True},
    "ernie4_5": {"use_bias": False},
    "helium": {},
    "qwen3_moe": {**EXPERTS, "decoder_sparse_step": 1, "mlp_only_layers": [], "moe_intermediate_size": 40},
    "olmoe": EXPERTS,
    "glm4_moe": {
        "num_hidden_layers": 3,
        "moe_intermediate_size": 40,
        "n_routed_experts": 6,
        "n_shared_experts": 1,
        "num_experts_per_tok": 2,
        "norm_topk_prob": True,
        "n_group": 1,
        "topk_group": 1,
        "routed_scaling_factor": 1.0,
        "first_k_dense_replace": 1,
        "use_qk_norm": True,
        "partial_rotary_factor": 0.5,
    },
}

_GATED_DELTA: dict[str, Any] = {
    "num_hidden_layers": 4,
    "full_attention_interval": 2,
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 12,
    "linear_conv_kernel_dim": 4,
    "linear_allow_neg_eigval": True,
    "partial_rotary_factor": 0.5,
    "num_experts": 0,
    "num_experts_per_tok": 0,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
}

_ROPE = {"type": "default", "mrope_section": [1, 1, 1], "rope_theta": 10000, "partial_rotary_factor": 0.5}

# Some layers see a sliding window of a few rows.
WINDOWED: dict[str, dict[str, Any]] = {
    "gemma3_text": {
        "num_hidden_layers": 3,
        "sliding_window": 6,
        "sliding_window_pattern": 3,
        "query_pre_attn_scalar": 16,
    },
    "olmo3": {
        "num_hidden_layers": 3,
        "sliding_window": 5,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    },
    "ministral3": {
        "num_hidden_layers": 3,
        "sliding_window": 4,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        "rope_parameters": {
            "rope_theta": 10000.0,
            "llama_4_scaling_beta": 0.1,
            "original_max_position_embeddings": 8,
        },
    },
    "gpt_oss": {
        "sliding_window": 6,
        "layer_types": ["sliding_attention", "full_attention"],
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
    },
}

# Some layers keep recurrent state instead of keys and values.
RECURRENT: dict[str, dict[str, Any]] = {
    "qwen3_next": _GATED_DELTA,
    "qwen3_5": {"text_config": {**COMMON, **_GATED_DELTA, "model_type": "qwen3_5", "rope_parameters": _ROPE}},
    "olmo_hybrid": {
        **_GATED_DELTA,
        "num_hidden_layers": 2,
        "layer_types": ["linear_attention", "full_attention"],
    },
    "nemotron_h": {
        "hybrid_override_pattern": ["M", "-", "M", "*"],
        "mamba_num_heads": 4,
        "mamba_head_dim": 12,
        "ssm_state_size": 16,
        "conv_kernel": 4,
        "n_groups": 2,
        "mamba_proj_bias": False,
        "use_conv_bias": True,
        "layer_norm_epsilon": 1e-5,
        "use_bias": False,
    },
    "falcon_h1": {
        "mamba_d_ssm": 48,
        "mamba_n_heads": 4,
        "mamba_d_head": 12,
        "mamba_d_state": 16,
        "mamba_n_groups": 2,
        "mamba_d_conv": 4,
    },
    "granitemoehybrid": {
        "num_hidden_layers": 3,
        "layer_types": ["mamba", "mamba", "attention"],
        "mamba_n_heads": 4,
        "mamba_d_head": 24,
        "mamba_d_state": 16,
        "mamba_n_groups": 2,
        "mamba_d_conv": 4,
        "mamba_conv_bias": True,
        "mamba_proj_bias": False,
        "embedding_multiplier": 1.0,
        "attention_multiplier": 0.3,
        "logits_scaling": 1.0,
        "residual_multiplier": 1.0,
        "num_local_experts": 0,
        "num_experts_per_tok": 0,
        "shared_intermediate_size": 32,
        "position_embedding_type": "rope",
    },
    "lfm2": {
        "num_hidden_layers": 3,
        "full_attn_idxs": [2],
        "conv_L_cache": 3,
        "conv_bias": False,
        "block_dim": 48,
        "block_ff_dim": 80,
        "block_multiple_of": 8,
        "block_ffn_dim_multiplier": 1.0,
        "block_auto_adjust_ff_dim": True,
        "norm_eps": 1e-5,
    },
    "rwkv7": {
        "a_low_rank_dim": 8,
        "v_low_rank_dim": 8,
        "gate_low_rank_dim": 8,
        "decay_low_rank_dim": 8,
        "norm_eps": 1e-5,
    },
    "recurrent_gemma": {
        "num_hidden_layers": 3,
        "attention_window_size": 6,
        "block_types": ["recurrent", "recurrent", "attention"],
        "lru_width": 48,
        "conv1d_width": 4,
        "logits_soft_cap": 30.0,
        "embeddings_scale_by_sqrt_dim": True,
    },
}

# A language model inside a multimodal one.
MULTIMODAL: dict[str, dict[str, Any]] = {
    "gemma3": {"text_config": {**COMMON, **WINDOWED["gemma3_text"], "model_type": "gemma3_text"}},
}

DENSE_ARCHITECTURES = [name for name in SPECIFIC if name not in ("qwen3_moe", "olmoe", "glm4_moe")]
MOE_ARCHITECTURES = ["qwen3_moe", "olmoe", "glm4_moe"]
ARCHITECTURES = DENSE_ARCHITECTURES + MOE_ARCHITECTURES

SPECIFIC.update(WINDOWED)
SPECIFIC.update(RECURRENT)
SPECIFIC.update(MULTIMODAL)
SPECIFIC.update({name: {**SHARED, **own} for name, own in FAMILIES.items()})


# --- models -------------------------------------------------------------------------------------------------


def _module(architecture: str) -> Any:
    name = {"mistral": "llama", "falcon_mamba": "mamba"}.get(architecture, architecture)
    return importlib.import_module(f"mlx_lm.models.{name}")


def tiny_config(architecture: str = "llama", **overrides: Any) -> dict[str, Any]:
    """The config.json of a tiny model: the ModelArgs fields of that architecture, `overrides` last."""
    config = {**COMMON, **SPECIFIC[architecture], "model_type": architecture}
    known = {field.name for field in dataclasses.fields(_module(architecture).ModelArgs)}
    unknown = set(overrides) - known
    if unknown:
        raise TypeError(f"{architecture} has no {sorted(unknown)}; it has {sorted(known)}")
    return {key: value for key, value in {**config, **overrides}.items() if key in known}


def tiny_model(architecture: str = "llama", *, seed: int = 0, **overrides: Any) -> Any:
    """A random float32 model of an mlx-lm architecture, in eval mode; `overrides` are ModelArgs fields.

    The weights are a function of (architecture, seed, overrides). Attention is sharp and outweighs the MLP;
    logits have a standard deviation of a few units. So greedy text varies (rarely, a seed gives one repeated
    token: seed 3 is good for all architectures) and sampling has entropy.
    """
    module = _module(architecture)
    config = tiny_config(architecture, **overrides)
    model = module.Model(module.ModelArgs.from_dict(config))
    _randomize(model, seed)
    model.eval()
    mx.eval(model.parameters())
    return model


def _parameters(model: nn.Module) -> dict[str, mx.array]:
    return dict(cast("list[tuple[str, mx.array]]", tree_flatten(model.parameters())))


def _randomize(model: nn.Module, seed: int) -> None:
    """Random weights for every parameter: matrices by fan-in, norms and biases near their initial value."""
    gains = {"q_proj": 3.0, "k_proj": 3.0, "o_proj": 3.0, "down_proj": 0.7, "qkv_proj": 2.0}
    weights = []
    for path, value in _parameters(model).items():
        key = mx.random.key(zlib.crc32(path.encode()) ^ (seed * 0x9E3779B1 & 0xFFFFFFFF))
        noise = mx.random.normal(value.shape, key=key)
        if "embed_tokens" in path:
            value = 0.3 * noise
        elif "lm_head" in path:
            value = 0.5 * noise
        elif value.ndim >= 2:
            gain = next((gain for name, gain in gains.items() if name in path), 1.5)
            value = gain * noise / value.shape[-1] ** 0.5
        elif path.endswith("bias"):
            value = 0.2 * noise  # not added to the initial value, which nn.Linear draws from global state
        elif path.endswith("A_log"):
            value = 0.5 * noise  # its initial value too is drawn from global state
        elif "q_norm" in path:
            value = 3.0 * value + 0.1 * noise
        elif "post_attention_layernorm" in path and model.model_type == "gemma2":
            value = value + 6.0 + 0.1 * noise
        else:
            value = value + 0.1 * noise
        weights.append((path, value.astype(mx.float32)))
    model.update(tree_unflatten(weights))


# --- tokenizer ----------------------------------------------------------------------------------------------

SPECIAL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if loop.first and message['role'] != 'system' %}<|im_start|>system\nBe brief.<|im_end|>\n{% endif %}"
    "<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

CORPUS = [
    "user system assistant Be brief. The sky is blue because the air scatters the light of the sun.",
    "The quick brown fox jumps over the lazy dog; then the dog and the fox rest in the sun together.",
    "def add(first, second):\n    return first + second\n\nprint(add(1, 2))\n",
    "In the beginning there was the word, and the word was with the other words in another line of the text.",
]


@lru_cache
def _tokenizer_json(vocabulary: int) -> str:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    full = pre_tokenizers.ByteLevel.alphabet()
    printable = [chr(code) for code in range(33, 127)] + ["Ġ", "Ċ", "ĉ"]
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        min_frequency=1,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=sorted(full) if vocabulary >= 300 else printable,
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    assert tokenizer.get_vocab_size() == vocabulary, tokenizer.get_vocab_size()
    return tokenizer.to_str()


def hf_tokenizer(vocabulary: int = VOCABULARY, *, chat_template: str | None = CHAT_TEMPLATE) -> Any:
    """The Hugging Face tokenizer inside `tiny_tokenizer`."""
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(_tokenizer_json(vocabulary)),
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
        chat_template=chat_template,
    )


def tiny_tokenizer(
    vocabulary: int = VOCABULARY, *, chat_template: str | None = CHAT_TEMPLATE
) -> TokenizerWrapper:
    """A byte-level BPE tokenizer with ChatML template, wrapped as mlx-lm does.

    With fewer than 300 ids it knows printable ASCII, newline and tab only; from 300 on, every byte. At most
    400: its corpus has no more pairs to merge.
    """
    return TokenizerWrapper(hf_tokenizer(vocabulary, chat_template=chat_template), BPEStreamingDetokenizer)


# --- folders ------------------------------------------------------------------------------------------------


def save_tiny(folder: str | Path, architecture: str = "llama", *, seed: int = 0, **overrides: Any) -> Path:
    """Write `tiny_model(architecture, ...)` and `tiny_tokenizer()` as an mlx-lm folder, which is returned."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    config = tiny_config(architecture, **overrides)
    tokenizer = hf_tokenizer(config.get("text_config", config)["vocab_size"])
    config["eos_token_id"] = config["pad_token_id"] = tokenizer.eos_token_id
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    model = tiny_model(architecture, seed=seed, **overrides)
    mx.save_safetensors(str(folder / "model.safetensors"), _parameters(model), metadata={"format": "mlx"})
    tokenizer.save_pretrained(folder)
    return folder


def never_end(folder: str | Path) -> None:
    """Makes texts of a model folder end by length alone: mlx-lm ends at the config's token and at the tokenizer's."""
    for name, end in (("config", {"eos_token_id": 10**6}), ("tokenizer_config", {"eos_token": "<never>"})):
        file = Path(folder) / f"{name}.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **end}))
