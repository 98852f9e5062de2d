"""The weights of a GGUF file, dequantised and under mlx-lm's (that is, Hugging Face's) names.

llama.cpp stores the rows of q and k of llama-type models interleaved for its rope; mlx-lm wants each head's two halves
one after the other, so those rows are put back. Legend: H heads, hd head size, D hidden size.
"""

from __future__ import annotations

import re
from typing import Any

import mlx.core as mx
import numpy as np

from mtp_mlx.errors import ConversionError

from .gguf_file import GGUFFile, TensorInfo

# Types `mx.load` reads rightly: the affine ones stay quantised (group size 32), the K-quants arrive as float16.
_AFFINE_BITS = {"Q4_0": 4, "Q4_1": 4, "Q8_0": 8}
_AS_FLOAT = {"F32", "F16", "Q2_K", "Q4_K", "Q6_K"}
_GROUP_SIZE = 32
SUPPORTED_TYPES = sorted({*_AFFINE_BITS, *_AS_FLOAT, "BF16"})

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
    """mlx-lm's name of a GGUF tensor, or None where a dense llama or qwen2 model has no such weight."""
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
        raise ConversionError(
            f"{gguf.path}: {len(unknown)} tensors have no place in a dense {gguf.metadata.get('general.architecture')} "
            f"model: {', '.join(unknown[:5])}{' ...' if len(unknown) > 5 else ''}."
        )


def load_weights(gguf: GGUFFile, config: dict[str, Any], dtype: mx.Dtype) -> dict[str, mx.array]:
    """All weights of the file in `dtype`, under mlx-lm's names, with q and k rows in mlx-lm's order.

    Raises ConversionError for a tensor of unsupported type or with an unknown name.
    """
    check_tensors(gguf)
    loaded = mx.load(str(gguf.path), format="gguf")
    assert isinstance(loaded, dict)
    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    weights = {}
    for name, info in gguf.tensors.items():
        target = mlx_name(name)
        if target is None:
            continue
        value = dequantise(gguf, info, loaded)
        match = _LAYER.fullmatch(name)
        if config["model_type"] == "llama" and match is not None and match[2] in heads:
            value = unpermute(value, heads[match[2]])
        weights[target] = value.astype(dtype)
        mx.eval(weights[target])
    return weights


def dequantise(gguf: GGUFFile, info: TensorInfo, loaded: dict[str, mx.array]) -> mx.array:
    """The tensor as floats of `info.shape`; `loaded` is `mx.load`'s dict, from which its arrays are taken."""
    if info.type_name == "BF16":  # mx.load would squeeze it into float16 and lose range
        loaded.pop(info.name, None)
        bits = np.fromfile(gguf.path, dtype="<u2", count=int(np.prod(info.shape)), offset=info.offset)
        return mx.array((bits.astype(np.uint32) << 16).view(np.float32).reshape(info.shape))
    value = loaded.pop(info.name)
    if info.type_name not in _AFFINE_BITS:
        return value
    stem = info.name.removesuffix("weight")
    # In float32: with float16 scales the product itself would be rounded to float16.
    scales = loaded.pop(f"{stem}scales").astype(mx.float32)
    biases = loaded.pop(f"{stem}biases").astype(mx.float32)
    return mx.dequantize(value, scales, biases, group_size=_GROUP_SIZE, bits=_AFFINE_BITS[info.type_name])
