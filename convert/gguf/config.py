"""GGUF metadata -> the `config.json` of an mlx-lm llama or qwen2 model."""

from __future__ import annotations

import math
from typing import Any

import mlx.core as mx
import numpy as np

from mtp_mlx.convert.gguf.file import GGUFFile
from mtp_mlx.convert.gguf.weights import ROPE_FACTORS
from mtp_mlx.errors import ConversionError

ARCHITECTURES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM"}
# Llama 3.1 and later: the only constants with which its rope factors have been published.
_LLAMA3_ROPE = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


def build_config(gguf: GGUFFile) -> dict[str, Any]:
    """The config.json of the model in `gguf`.

    Raises ConversionError: settings that mlx-lm's llama and qwen2 do not have.
    """
    arch = gguf.require("general.architecture")
    if arch not in ARCHITECTURES:
        raise ConversionError(
            f"{gguf.path}: architecture {arch!r} is not supported, only {' and '.join(ARCHITECTURES)} are. "
            "Use the model's safetensors checkpoint with mlx-lm instead."
        )
    if gguf.metadata.get(f"{arch}.expert_count", 0):
        raise ConversionError(
            f"{gguf.path}: a mixture of experts; only dense models can be converted from GGUF."
        )
    layers = _whole(gguf, f"{arch}.block_count")
    if layers > len(gguf.tensors):
        raise ConversionError(
            f"{gguf.path}: {layers:,} layers, but only {len(gguf.tensors):,} tensors. Get the file again."
        )
    n_heads = _whole(gguf, f"{arch}.attention.head_count")
    hidden_size = _whole(gguf, f"{arch}.embedding_length")
    head_dim = gguf.metadata.get(f"{arch}.attention.key_length", hidden_size // n_heads)
    _check_heads(gguf, arch, hidden_size, n_heads, head_dim)
    config: dict[str, Any] = {
        "architectures": [ARCHITECTURES[arch]],
        "model_type": arch,
        "hidden_size": hidden_size,
        "num_hidden_layers": layers,
        "intermediate_size": _whole(gguf, f"{arch}.feed_forward_length"),
        "num_attention_heads": n_heads,
        "num_key_value_heads": _whole(gguf, f"{arch}.attention.head_count_kv", n_heads),
        "head_dim": head_dim,
        "rms_norm_eps": shortest_float(gguf.require(f"{arch}.attention.layer_norm_rms_epsilon")),
        "max_position_embeddings": _whole(gguf, f"{arch}.context_length"),
        "rope_theta": shortest_float(gguf.metadata.get(f"{arch}.rope.freq_base", 10000.0)),
        "vocab_size": _vocab_size(gguf),
        "tie_word_embeddings": "output.weight" not in gguf.tensors,
        "hidden_act": "silu",
    }
    scaling = rope_scaling(gguf, arch, config)
    if scaling is not None:
        config["rope_scaling"] = scaling
    if arch == "llama":
        config["attention_bias"] = any(".attn_" in name and name.endswith(".bias") for name in gguf.tensors)
        config["mlp_bias"] = any(".ffn_" in name and name.endswith(".bias") for name in gguf.tensors)
    for role in ("bos", "eos"):
        token_id = gguf.metadata.get(f"tokenizer.ggml.{role}_token_id")
        if token_id is not None:
            config[f"{role}_token_id"] = token_id
    return config


def shortest_float(value: float) -> float:
    """The shortest decimal that is the same float32: 9.99999974e-06 -> 1e-05."""
    return float(str(np.float32(value)))


def _whole(gguf: GGUFFile, key: str, default: int | None = None) -> int:
    value = gguf.metadata.get(key, default) if default is not None else gguf.require(key)
    if isinstance(value, list):
        if len(set(value)) != 1:
            raise ConversionError(
                f"{gguf.path}: {key} differs from layer to layer, which mlx-lm's model cannot express."
            )
        value = value[0]
    if isinstance(value, bool) or not isinstance(value, int):
        raise ConversionError(
            f"{gguf.path}: the metadata key {key!r} should be a whole number, it is {value!r}."
        )
    return value


def _check_heads(gguf: GGUFFile, arch: str, hidden_size: int, n_heads: int, head_dim: int) -> None:
    value_dim = gguf.metadata.get(f"{arch}.attention.value_length", head_dim)
    rope_dim = gguf.metadata.get(f"{arch}.rope.dimension_count", head_dim)
    if value_dim != head_dim or rope_dim != head_dim:
        raise ConversionError(
            f"{gguf.path}: key size {head_dim}, value size {value_dim} and rope size {rope_dim} of a head "
            f"differ, which mlx-lm's {arch} cannot express."
        )
    if arch == "qwen2" and head_dim * n_heads != hidden_size:
        raise ConversionError(
            f"{gguf.path}: {n_heads} heads of {head_dim} do not make the hidden size {hidden_size}, "
            "as qwen2 needs."
        )


def _vocab_size(gguf: GGUFFile) -> int:
    if "token_embd.weight" not in gguf.tensors:
        raise ConversionError(f"{gguf.path}: the tensor 'token_embd.weight' is missing.")
    n_rows = gguf.tensors["token_embd.weight"].shape[0]
    n_tokens = len(gguf.require("tokenizer.ggml.tokens"))
    if n_tokens > n_rows:
        raise ConversionError(f"{gguf.path}: {n_tokens} tokens but only {n_rows} rows of embeddings.")
    return n_rows


def rope_scaling(gguf: GGUFFile, arch: str, config: dict[str, Any]) -> dict[str, Any] | None:
    """The `rope_scaling` entry of config.json, or None; raises ConversionError for an unknown kind."""
    if ROPE_FACTORS in gguf.tensors:
        return _llama3_scaling(gguf, config)
    factor = gguf.metadata.get(
        f"{arch}.rope.scaling.factor", gguf.metadata.get(f"{arch}.rope.scale_linear", 1.0)
    )
    kind = gguf.metadata.get(f"{arch}.rope.scaling.type", "linear")
    if kind == "none" or factor in (0.0, 1.0):
        return None
    scaling: dict[str, Any] = {"rope_type": kind, "factor": shortest_float(factor)}
    if kind == "yarn":
        original = gguf.require(f"{arch}.rope.scaling.original_context_length")
        scaling["original_max_position_embeddings"] = original
    elif kind != "linear":
        raise ConversionError(
            f"{gguf.path}: rope scaling of type {kind!r} is not supported, only linear and yarn are."
        )
    return scaling


def _llama3_scaling(gguf: GGUFFile, config: dict[str, Any]) -> dict[str, Any]:
    """The constants of llama3's scaling, which llama.cpp stores as one divisor per frequency: (hd / 2,)."""
    if gguf.tensors[ROPE_FACTORS].type_name != "F32":
        raise ConversionError(f"{gguf.path}: {ROPE_FACTORS} should be F32.")
    info = gguf.tensors[ROPE_FACTORS]
    divisors = np.fromfile(gguf.path, dtype="<f4", count=math.prod(info.shape), offset=info.offset)
    scaling = {"rope_type": "llama3", "factor": shortest_float(divisors.max()), **_LLAMA3_ROPE}
    if not np.allclose(
        divisors, llama3_divisors(config["rope_theta"], config["head_dim"], scaling), rtol=1e-4
    ):
        raise ConversionError(
            f"{gguf.path}: {ROPE_FACTORS} does not follow the Llama 3 rule with its published constants "
            f"{_LLAMA3_ROPE}; other rope factors are not supported."
        )
    return scaling


def llama3_divisors(theta: float, head_dim: int, scaling: dict[str, Any]) -> np.ndarray:
    """(hd / 2,) float64: what Llama 3 divides each rope frequency by."""
    freqs = theta ** -(np.arange(0, head_dim, 2) / head_dim)
    turns = scaling["original_max_position_embeddings"] * freqs / (2 * np.pi)
    low, high, factor = scaling["low_freq_factor"], scaling["high_freq_factor"], scaling["factor"]
    smooth = np.clip((turns - low) / (high - low), 0, 1)
    return 1 / ((1 - smooth) / factor + smooth)


def default_dtype() -> mx.Dtype:
    """bfloat16 where Metal runs, float32 on CPU (which has no fast bfloat16)."""
    return mx.bfloat16 if mx.metal.is_available() else mx.float32
