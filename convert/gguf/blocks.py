"""GGUF's tensor types -> float32, one numpy function per type.

Rare types, and those with large tables, are left to llama.cpp's own package `gguf`, which need not be installed for
the others. `mx.load` reads GGUF too, but not every common type (no Q5_K), bfloat16 only through float16, and Q4_K
wrongly (measured with mlx 0.32.4 against `gguf`). Legend: n blocks in a row of memory, each of 32 or 256 elements.
"""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType

import numpy as np
from numpy.typing import NDArray

Bytes = NDArray[np.uint8]
Floats = NDArray[np.float32]


def _half(columns: Bytes) -> Floats:
    """(n, 2) bytes -> (n, 1) numbers."""
    return np.ascontiguousarray(columns).view("<f2").astype(np.float32)


def _nibbles(columns: Bytes) -> Bytes:
    """(n, 16) bytes -> (n, 32): all low halves, then all high halves."""
    return np.concatenate([columns & 15, columns >> 4], axis=1)


def _fifth_bits(columns: Bytes) -> Bytes:
    """(n, 4) bytes -> (n, 32) zeros and sixteens, to be added to nibbles."""
    return np.unpackbits(columns, axis=1, bitorder="little") << np.uint8(4)


def _q4_0(b: Bytes) -> Floats:
    return _half(b[:, :2]) * (_nibbles(b[:, 2:]).astype(np.float32) - 8)


def _q4_1(b: Bytes) -> Floats:
    return _half(b[:, :2]) * _nibbles(b[:, 4:]).astype(np.float32) + _half(b[:, 2:4])


def _q5_0(b: Bytes) -> Floats:
    quants = _nibbles(b[:, 6:]) | _fifth_bits(b[:, 2:6])
    return _half(b[:, :2]) * (quants.astype(np.float32) - 16)


def _q5_1(b: Bytes) -> Floats:
    quants = _nibbles(b[:, 8:]) | _fifth_bits(b[:, 4:8])
    return _half(b[:, :2]) * quants.astype(np.float32) + _half(b[:, 2:4])


def _q8_0(b: Bytes) -> Floats:
    return _half(b[:, :2]) * b[:, 2:].view(np.int8).astype(np.float32)


def _six_bit_scales(b: Bytes) -> tuple[Floats, Floats]:
    """(n, 8, 1) scales and (n, 8, 1) minima of Q4_K and Q5_K, unpacked from 12 bytes and times d and dmin."""
    low, high, rest = b[:, 4:8], b[:, 8:12], b[:, 12:16]
    scales = np.concatenate([low & 63, (rest & 15) | (low >> 6 << 4)], axis=1)
    minima = np.concatenate([high & 63, (rest >> 4) | (high >> 6 << 4)], axis=1)
    d, d_min = _half(b[:, :2]), _half(b[:, 2:4])
    return (d * scales)[..., None], (d_min * minima)[..., None]


def _pairs_of_32(columns: Bytes) -> Bytes:
    """(n, 128) bytes -> (n, 8, 32): of every 32 bytes the low halves, then the high halves."""
    groups = columns.reshape(-1, 4, 1, 32)
    return np.concatenate([groups & 15, groups >> 4], axis=2).reshape(-1, 8, 32)


def _q4_k(b: Bytes) -> Floats:
    scales, minima = _six_bit_scales(b)
    return scales * _pairs_of_32(b[:, 16:]).astype(np.float32) - minima


def _q5_k(b: Bytes) -> Floats:
    scales, minima = _six_bit_scales(b)
    fifth = b[:, None, 16:48] >> np.arange(8, dtype=np.uint8)[:, None] & 1
    return scales * (_pairs_of_32(b[:, 48:]) | fifth << 4).astype(np.float32) - minima


def _q6_k(b: Bytes) -> Floats:
    low, high = b[:, :128].reshape(-1, 2, 1, 64), b[:, 128:192].reshape(-1, 2, 1, 32)
    nibbles = np.concatenate([low & 15, low >> 4], axis=2).reshape(-1, 2, 4, 32)
    top = high >> np.array([0, 2, 4, 6], dtype=np.uint8)[:, None] & 3
    quants = (nibbles | top << 4).reshape(-1, 16, 16).astype(np.float32) - 32
    scales = _half(b[:, 208:210]) * b[:, 192:208].view(np.int8).astype(np.float32)
    return scales[..., None] * quants


def _bf16(b: Bytes) -> Floats:
    return (b.view("<u2").astype(np.uint32) << 16).view(np.float32)


# Type name -> (n, bytes per block) uint8 to float32 with n * elements per block entries.
DEQUANTISERS: dict[str, Callable[[Bytes], Floats]] = {
    "F32": lambda b: b.view("<f4").astype(np.float32),
    "F16": lambda b: b.view("<f2").astype(np.float32),
    "BF16": _bf16,
    "Q4_0": _q4_0,
    "Q4_1": _q4_1,
    "Q5_0": _q5_0,
    "Q5_1": _q5_1,
    "Q8_0": _q8_0,
    "Q4_K": _q4_k,
    "Q5_K": _q5_k,
    "Q6_K": _q6_k,
}

# Types that the package `gguf` dequantises.
BY_LIBRARY = (
    *("Q2_K", "Q3_K", "IQ4_NL", "IQ4_XS"),
    *("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S"),
)


def library() -> ModuleType | None:
    """The package `gguf`, or None where it is not installed or too old to have `quants`."""
    try:
        import gguf
        import gguf.quants
    except ImportError:
        return None
    return gguf if hasattr(gguf.quants, "dequantize") else None


def dequantiser(kind: str) -> Callable[[Bytes], Floats]:
    """The function for a type of `DEQUANTISERS` or `BY_LIBRARY`; for the latter `library()` must be there."""
    if kind in DEQUANTISERS:
        return DEQUANTISERS[kind]
    package = library()
    assert package is not None and kind in BY_LIBRARY, kind  # `names.check_tensors` has asked
    return lambda b: package.quants.dequantize(b, package.GGMLQuantizationType[kind])
