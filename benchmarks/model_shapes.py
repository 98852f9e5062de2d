"""mlx-lm models without weights: every tensor has its shape and type, and takes no memory.

All elements of a tensor are one zero (a broadcast), so a model of any size is made in a second. It is good for
counting: bytes, parameters, FLOP.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_map
from mlx_lm.utils import _get_classes, quantize_model

_LLAMA: dict[str, Any] = {"rms_norm_eps": 1e-5, "max_position_embeddings": 32768, "rope_theta": 1e6}

# What the models' own config.json says, as far as shapes go.
SHAPES: dict[str, dict[str, Any]] = {
    "qwen2.5-0.5b": {
        **_LLAMA,
        "model_type": "qwen2",
        "hidden_size": 896,
        "intermediate_size": 4864,
        "num_hidden_layers": 24,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
        "vocab_size": 151936,
        "tie_word_embeddings": True,
    },
    "qwen3-4b": {
        **_LLAMA,
        "model_type": "qwen3",
        "hidden_size": 2560,
        "intermediate_size": 9728,
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 151936,
        "tie_word_embeddings": True,
    },
    "qwen3-8b": {
        **_LLAMA,
        "model_type": "qwen3",
        "hidden_size": 4096,
        "intermediate_size": 12288,
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 151936,
        "tie_word_embeddings": False,
    },
    "llama-3.1-8b": {
        **_LLAMA,
        "model_type": "llama",
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
        "tie_word_embeddings": False,
    },
}
GROUP = 64  # weights with a scale of their own, when quantised


def config_of(name: str) -> dict[str, Any]:
    """The config of one of `SHAPES`, or of a folder with a config.json."""
    if name in SHAPES:
        return dict(SHAPES[name])
    config: dict[str, Any] = json.loads((Path(name) / "config.json").read_text(encoding="utf-8"))
    return config


def weightless(config: dict[str, Any], bits: int) -> nn.Module:
    """A model of this config, quantised to `bits` bits as mlx-lm does it, or in bfloat16 (16).

    A config that is quantised already keeps its own precision.
    """
    classes: Callable[..., Any] = _get_classes
    model_class, arguments = classes(config)
    model: nn.Module = model_class(arguments.from_dict(config))
    model.set_dtype(mx.bfloat16)
    _without_weights(model)
    own = config.get("quantization") or {}
    if own or bits < 16:
        model, _ = quantize_model(model, config, own.get("group_size", GROUP), own.get("bits", bits))
        _without_weights(model)
    return model


def _without_weights(model: nn.Module) -> None:
    """Replaces every tensor by zeros that are never stored."""
    zeros = {
        dtype: mx.zeros((), dtype) for dtype in (mx.float32, mx.bfloat16, mx.float16, mx.uint32, mx.uint8)
    }
    model.update(tree_map(lambda value: mx.broadcast_to(zeros[value.dtype], value.shape), model.parameters()))
