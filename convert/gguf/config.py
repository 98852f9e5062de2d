"""GGUF metadata -> `config.json` and `generation_config.json` of an mlx-lm llama, qwen2 or qwen3 model."""

from __future__ import annotations

from typing import Any

from mtp_mlx.convert.gguf.file import HOW_TO_MEND, GGUFFile
from mtp_mlx.convert.gguf.keys import check_keys
from mtp_mlx.convert.gguf.rope import rope_scaling, shortest_float
from mtp_mlx.convert.gguf.vocabulary import special_id, stop_ids, tokens_of
from mtp_mlx.errors import ConversionError

ARCHITECTURES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}
_NO_MODELS = {
    "adapter": "a LoRA adapter",
    "mmproj": "an image or audio encoder",
    "imatrix": "an importance matrix",
}


def build_config(gguf: GGUFFile) -> dict[str, Any]:
    """The config.json of the model in `gguf`.

    Raises ConversionError: settings that mlx-lm's llama, qwen2 and qwen3 do not have, or that contradict each other.
    """
    kind = gguf.metadata.get("general.type", "model")
    if kind in _NO_MODELS:
        raise ConversionError(
            f"{gguf.path}: this is {_NO_MODELS[kind]} for llama.cpp, not a model. Give the model's file."
        )
    arch = gguf.require("general.architecture")
    if arch not in ARCHITECTURES:
        raise ConversionError(
            f"{gguf.path}: architecture {arch!r} is not supported, only {', '.join(ARCHITECTURES)} are. "
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
        "vocab_size": _vocab_size(gguf, arch),
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
        token_id = special_id(gguf, role)
        if token_id is not None:
            config[f"{role}_token_id"] = token_id
    check_keys(gguf, arch, config)
    return config


def generation_config(gguf: GGUFFile) -> dict[str, Any]:
    """generation_config.json: where text begins, and all tokens that end it."""
    config: dict[str, Any] = {}
    if (bos := special_id(gguf, "bos")) is not None:
        config["bos_token_id"] = bos
    if stops := stop_ids(gguf):
        config["eos_token_id"] = stops[0] if len(stops) == 1 else stops
    return config


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


def _vocab_size(gguf: GGUFFile, arch: str) -> int:
    """Rows of the embedding, which may be more than there are tokens: some models are padded."""
    if "token_embd.weight" not in gguf.tensors:
        raise ConversionError(f"{gguf.path}: the tensor 'token_embd.weight' is missing.")
    n_rows = gguf.tensors["token_embd.weight"].shape[0]
    n_tokens = len(tokens_of(gguf))
    if n_tokens > n_rows:
        raise ConversionError(f"{gguf.path}: {n_tokens} tokens but only {n_rows} rows of embeddings.")
    stated = gguf.metadata.get(f"{arch}.vocab_size", n_rows)
    if stated not in (n_tokens, n_rows):
        raise ConversionError(
            f"{gguf.path}: the vocabulary contradicts itself: {arch}.vocab_size is {stated!r}, with "
            f"{n_tokens} tokens and {n_rows} rows of embeddings. {HOW_TO_MEND}"
        )
    return n_rows
