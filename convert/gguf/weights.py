"""The weights of a GGUF file, dequantised and under mlx-lm's (that is, Hugging Face's) names.

llama.cpp stores the rows of q and k of llama-type models interleaved for its rope; mlx-lm wants each head's
two halves one after the other, so those rows are put back. Legend: H heads, hd head size, D hidden size.
"""

from __future__ import annotations

import re
from typing import Any

import mlx.core as mx
import numpy as np

from mtp_mlx.convert.gguf.blocks import DEQUANTISERS
from mtp_mlx.convert.gguf.file import TENSOR_TYPES, GGUFFile, TensorInfo
from mtp_mlx.errors import ConversionError

SUPPORTED_TYPES = tuple(DEQUANTISERS)

_LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_TOP_NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_LAYER = re.compile(r"blk\.(\d+)\.(\w+)\.(weight|bias)")
# Read into config.json (rope scaling), not a weight.
ROPE_FACTORS = "rope_freqs.weight"


def mlx_name(gguf_name: str) -> str | None:
    """mlx-lm's name of a GGUF tensor, or None if a dense llama or qwen2 model does not have that weight."""
    if gguf_name in _TOP_NAMES:
        return _TOP_NAMES[gguf_name]
    match = _LAYER.fullmatch(gguf_name)
    if match is None or match[2] not in _LAYER_NAMES:
        return None
    return f"model.layers.{match[1]}.{_LAYER_NAMES[match[2]]}.{match[3]}"


def unpermute(rows: mx.array, n_heads: int) -> mx.array:
    """Undo llama.cpp's interleaving of q or k rows. rows (H * hd, D) or a bias (H * hd,); same shape back."""
    head_rows = rows.reshape(n_heads, rows.shape[0] // n_heads // 2, 2, *rows.shape[1:])
    return head_rows.swapaxes(1, 2).reshape(rows.shape)


def check_tensors(gguf: GGUFFile) -> None:
    """Raise one ConversionError listing every tensor with an unsupported type or an unknown name."""
    bad_types: dict[str, list[str]] = {}
    for info in gguf.tensors.values():
        if info.type_name not in SUPPORTED_TYPES:
            bad_types.setdefault(info.type_name, []).append(info.name)
    if bad_types:
        found = "; ".join(
            f"{kind} ({names[0]} and {len(names) - 1} more)" for kind, names in bad_types.items()
        )
        raise ConversionError(
            f"{gguf.path}: tensors of unsupported type: {found}. Supported are {', '.join(SUPPORTED_TYPES)}: "
            "requantise the checkpoint to one of these, Q8_0 for example."
        )
    unknown = [name for name in gguf.tensors if name != ROPE_FACTORS and mlx_name(name) is None]
    if unknown:
        arch = gguf.metadata.get("general.architecture")
        raise ConversionError(
            f"{gguf.path}: {len(unknown)} tensors have no place in a dense {arch} model: "
            f"{', '.join(unknown[:5])}{' ...' if len(unknown) > 5 else ''}."
        )


def load_weights(gguf: GGUFFile, config: dict[str, Any], dtype: mx.Dtype) -> dict[str, mx.array]:
    """All weights of the file in `dtype`, under mlx-lm's names, with q and k rows in mlx-lm's order.

    Raises ConversionError for a tensor of unsupported type or with an unknown name.
    """
    check_tensors(gguf)
    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    weights = {}
    for name, info in gguf.tensors.items():
        target = mlx_name(name)
        if target is None:
            continue
        value = dequantise(gguf, info)
        match = _LAYER.fullmatch(name)
        if config["model_type"] == "llama" and match is not None and match[2] in heads:
            value = unpermute(value, heads[match[2]])
        weights[target] = value.astype(dtype)
        mx.eval(weights[target])
    return weights


def dequantise(gguf: GGUFFile, info: TensorInfo) -> mx.array:
    """The tensor `info` of the file as float32, of shape `info.shape`; its type must be in
    SUPPORTED_TYPES."""
    block_bytes = next(n_bytes for name, _, n_bytes in TENSOR_TYPES.values() if name == info.type_name)
    raw = np.fromfile(gguf.path, dtype=np.uint8, count=info.n_bytes or 0, offset=info.offset)
    return mx.array(DEQUANTISERS[info.type_name](raw.reshape(-1, block_bytes)).reshape(info.shape))
