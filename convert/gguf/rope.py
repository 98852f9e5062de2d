"""Rope scaling in GGUF -> `rope_scaling` of config.json."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from mtp_mlx.convert.gguf.file import HOW_TO_MEND, GGUFFile
from mtp_mlx.convert.gguf.names import ROPE_FACTORS
from mtp_mlx.errors import ConversionError

# Llama 3.1 and later: the only constants with which its rope factors have been published.
_LLAMA3_ROPE = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
_YARN_BETAS = {
    "beta_fast": "yarn_beta_fast",
    "beta_slow": "yarn_beta_slow",
}  # defaults are 32 and 1 everywhere


def shortest_float(value: float) -> float:
    """The shortest decimal that is the same float32: 9.99999974e-06 -> 1e-05."""
    return float(str(np.float32(value)))


def rope_scaling(gguf: GGUFFile, arch: str, config: dict[str, Any]) -> dict[str, Any] | None:
    """The `rope_scaling` entry of config.json, or None.

    Raises ConversionError: an unknown kind, a factor that is none, or two kinds at once.
    """
    prefix = f"{arch}.rope.scaling"
    factor = gguf.metadata.get(f"{prefix}.factor", gguf.metadata.get(f"{arch}.rope.scale_linear", 1.0))
    kind = gguf.metadata.get(f"{prefix}.type", "linear")
    if kind not in ("none", "linear", "yarn"):
        raise ConversionError(
            f"{gguf.path}: rope scaling of type {kind!r} is not supported, only linear and yarn are."
        )
    if not isinstance(factor, int | float) or not 0 <= factor < math.inf:
        raise ConversionError(f"{gguf.path}: rope is scaled by a factor of {factor!r}. {HOW_TO_MEND}")
    scaled = kind != "none" and factor not in (0.0, 1.0)  # llama.cpp reads 0 as "not set"
    if ROPE_FACTORS in gguf.tensors:
        if scaled:
            raise ConversionError(
                f"{gguf.path}: it scales rope twice, by {ROPE_FACTORS} and by {prefix}.factor = {factor!r} ({kind}), "
                "which mlx-lm cannot express. Use the model's safetensors checkpoint instead."
            )
        return _llama3_scaling(gguf, config)
    if not scaled:
        return None
    scaling: dict[str, Any] = {"rope_type": kind, "factor": shortest_float(factor)}
    if kind == "yarn":
        scaling["original_max_position_embeddings"] = gguf.require(f"{prefix}.original_context_length")
        for ours, theirs in _YARN_BETAS.items():
            if f"{prefix}.{theirs}" in gguf.metadata:
                scaling[ours] = shortest_float(gguf.metadata[f"{prefix}.{theirs}"])
    return scaling


def _llama3_scaling(gguf: GGUFFile, config: dict[str, Any]) -> dict[str, Any]:
    """The constants of llama3's scaling, which llama.cpp stores as one divisor per frequency: (hd / 2,)."""
    info = gguf.tensors[ROPE_FACTORS]
    if info.type_name != "F32" or info.shape != (config["head_dim"] // 2,):
        raise ConversionError(
            f"{gguf.path}: {ROPE_FACTORS} should be F32 of shape [{config['head_dim'] // 2}], one divisor per "
            f"frequency; it is {info.type_name}, {list(info.shape)}. {HOW_TO_MEND}"
        )
    divisors = np.fromfile(info.path, dtype="<f4", count=math.prod(info.shape), offset=info.offset)
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
