"""The weights of a GGUF file, dequantised and under mlx-lm's (that is, Hugging Face's) names.

llama.cpp stores the rows of q and k of llama-type models interleaved for its rope; mlx-lm wants each head's
two halves one after the other, so those rows are put back. Legend: H heads, hd head size, D hidden size.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np

from mtp_mlx.convert.gguf.blocks import dequantiser
from mtp_mlx.convert.gguf.file import TENSOR_TYPES, GGUFFile, TensorInfo
from mtp_mlx.convert.gguf.names import LAYER, check_tensors, mlx_name


def default_dtype() -> mx.Dtype:
    """bfloat16 where Metal runs, float32 on CPU (which has no fast bfloat16)."""
    return mx.bfloat16 if mx.metal.is_available() else mx.float32


def unpermute(rows: mx.array, n_heads: int) -> mx.array:
    """Undo llama.cpp's interleaving of q or k rows. rows (H * hd, D) or a bias (H * hd,); same shape back."""
    head_rows = rows.reshape(n_heads, rows.shape[0] // n_heads // 2, 2, *rows.shape[1:])
    return head_rows.swapaxes(1, 2).reshape(rows.shape)


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
        value = dequantise(info)
        match = LAYER.fullmatch(name)
        if config["model_type"] == "llama" and match is not None and match[2] in heads:
            value = unpermute(value, heads[match[2]])
        weights[target] = value.astype(dtype)
        mx.eval(weights[target])
    return weights


def dequantise(info: TensorInfo) -> mx.array:
    """The tensor as float32, of shape `info.shape`; its type must be one of `names.SUPPORTED_TYPES`."""
    block_bytes = next(n_bytes for name, _, n_bytes in TENSOR_TYPES.values() if name == info.type_name)
    raw = np.fromfile(info.path, dtype=np.uint8, count=info.n_bytes or 0, offset=info.offset)
    return mx.array(dequantiser(info.type_name)(raw.reshape(-1, block_bytes)).reshape(info.shape))
