"""A tensor of a checkpoint that is read only on demand, and the number types of checkpoints.

Types are named as in safetensors ("F32", "BF16", ...). numpy has neither bfloat16 nor fp8, so such tensors are read
as bits (uint16, uint8); `to_float32` and `from_float32` convert. Nothing here needs mlx or torch.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

# Name of a type -> the numpy type that holds its bits.
STORED_AS: dict[str, Any] = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": np.uint16,
    "F8_E4M3": np.uint8,
    "I64": np.int64,
    "I32": np.int32,
    "I16": np.int16,
    "I8": np.int8,
    "U64": np.uint64,
    "U32": np.uint32,
    "U16": np.uint16,
    "U8": np.uint8,
    "BOOL": np.bool_,
}
FLOATS = ("F64", "F32", "F16", "BF16")


@dataclass(frozen=True)
class LazyTensor:
    """One tensor of a checkpoint.

    Attributes:
        dtype: a key of STORED_AS.
        shape: row-major.
        load: reads the tensor: an array of `shape` and of type STORED_AS[dtype], perhaps a read-only map of the file.
    """

    dtype: str
    shape: tuple[int, ...]
    load: Callable[[], np.ndarray]

    @property
    def n_bytes(self) -> int:
        """Size of the tensor in bytes."""
        return math.prod(self.shape) * int(np.dtype(STORED_AS[self.dtype]).itemsize)

    def float32(self) -> np.ndarray:
        """The values as float32."""
        return to_float32(self.load(), self.dtype)


def to_float32(stored: np.ndarray, dtype: str) -> np.ndarray:
    """The values of an array of type `dtype` (as stored) in float32."""
    if dtype == "BF16":
        return (stored.astype(np.uint32) << 16).view(np.float32)
    if dtype == "F8_E4M3":
        return _E4M3[stored]
    return np.asarray(stored, dtype=np.float32)


def from_float32(values: np.ndarray, dtype: str) -> np.ndarray:
    """float32 values as the float type `dtype`, rounded to the nearest, ties to even."""
    if dtype != "BF16":
        return values.astype(STORED_AS[dtype])
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    # Rounding must not turn NaN into infinity.
    return np.where(np.isnan(values), (bits >> 16) | 0x40, rounded).astype(np.uint16)


def _e4m3_values() -> np.ndarray:
    """[256] float32: sign, 4 bits of exponent (bias 7), 3 of mantissa; no infinity, 0x7F and 0xFF are NaN."""
    code = np.arange(256)
    exponent, mantissa = (code >> 3) & 15, code & 7
    value = np.where(exponent == 0, mantissa / 8 * 2.0**-6, (1 + mantissa / 8) * 2.0 ** (exponent - 7.0))
    value = np.where(code & 127 == 127, np.nan, value)
    return np.where(code < 128, value, -value).astype(np.float32)


_E4M3 = _e4m3_values()
