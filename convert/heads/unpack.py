"""The numbers of quantised matrices, in numpy: mlx's affine mode and its three floating ones. Needs no mlx.

mlx packs the codes of a row as one stream of bits, the lowest first, cut into words of 32. An affine number is
code * scale + bias of its group; a floating one is a small float (OCP Microscaling Formats 1.0) times the scale.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from mtp_mlx.convert.read.lazy_tensor import to_float32

_E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)
_E2M1 = np.concatenate([_E2M1, -_E2M1])  # by code: sign, two bits of exponent, one of mantissa


def numbers_of(
    parts: Sequence[np.ndarray], types: Sequence[str], bits: int, group_size: int, mode: str
) -> np.ndarray:
    """[..., M, N] float32 numbers of a quantised matrix.

    Args:
        parts: as stored: the words [..., M, N bits / 32] uint32, the scales [..., M, N / group_size], and in the mode
            "affine" the biases, of the scales' shape.
        types: of the parts, keys of `STORED_AS`.
        bits, group_size, mode: as `mlx.core.quantize` takes them.
    """
    codes = _codes(parts[0], bits)
    if mode == "affine":
        scales, biases = (to_float32(part, kind) for part, kind in zip(parts[1:], types[1:], strict=True))
        return codes * _spread(scales, group_size) + _spread(biases, group_size)
    numbers = _E2M1[codes] if bits == 4 else to_float32(codes, "F8_E4M3")
    if mode == "nvfp4":
        scales = to_float32(parts[1], "F8_E4M3")
    else:  # a power of two
        scales = np.ldexp(np.float32(1), parts[1].astype(np.int32) - 127)
    return numbers * _spread(scales, group_size)


def _codes(words: np.ndarray, bits: int) -> np.ndarray:
    """[..., N] uint8."""
    stream = np.unpackbits(np.ascontiguousarray(words).view(np.uint8), axis=-1, bitorder="little")
    return np.packbits(stream.reshape(*words.shape[:-1], -1, bits), axis=-1, bitorder="little")[..., 0]


def _spread(of_groups: np.ndarray, group_size: int) -> np.ndarray:
    """[..., N] from one number for each group."""
    return np.repeat(of_groups, group_size, axis=-1)
