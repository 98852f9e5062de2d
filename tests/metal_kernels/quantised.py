"""Random quantised products and their float64 results, in numpy: independent of MLX's own arithmetic."""

from __future__ import annotations

from typing import NamedTuple

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

Doubles = NDArray[np.float64]
UNIT = {mx.float32: 2.0**-24, mx.float16: 2.0**-11, mx.bfloat16: 2.0**-8}  # half a step, relative


class Product(NamedTuple):
    """Arguments of `small_m_qmm.run` and of `row_exact.run`, in order."""

    x: mx.array  # [M, K]
    w: mx.array  # [N, K * bits / 32]
    scales: mx.array  # [N, K / group_size]
    biases: mx.array  # [N, K / group_size]
    group_size: int
    bits: int

    def rows(self, wanted: list[int]) -> Product:
        """The same product with these rows of x."""
        return self._replace(x=self.x[mx.array(wanted)])


def random_product(
    rows: int, columns: int, size: int, group_size: int, bits: int, dtype: mx.Dtype, seed: int = 0
) -> Product:
    """Any packed bits, scales of both signs, and biases that do not cancel them."""
    rng = np.random.default_rng((seed, rows, columns, size, bits))
    words = rng.integers(0, 2**32, (columns, size * bits // 32), dtype=np.uint32)
    groups = (columns, size // group_size)
    scales = rng.normal(size=groups) / 2**bits
    biases = rng.normal(size=groups) / 2
    return Product(
        mx.array(rng.normal(size=(rows, size)).astype(np.float32)).astype(dtype),
        mx.array(words),
        mx.array(scales.astype(np.float32)).astype(dtype),
        mx.array(biases.astype(np.float32)).astype(dtype),
        group_size,
        bits,
    )


def doubles(array: mx.array) -> Doubles:
    """The array in float64, exactly."""
    return np.array(array.astype(mx.float32)).astype(np.float64)


def unpacked(product: Product) -> Doubles:
    """The packed integers, [N, K]."""
    words = np.array(product.w)[:, :, None]
    shifts = np.arange(0, 32, product.bits, dtype=np.uint32)
    values = (words >> shifts) & np.uint32(2**product.bits - 1)  # (N, words, values of a word)
    return values.reshape(words.shape[0], -1).astype(np.float64)


def result(product: Product) -> Doubles:
    """`x @ dequantize(w).T` in float64, [M, N]."""
    scales, biases = (
        np.repeat(doubles(a), product.group_size, axis=1) for a in (product.scales, product.biases)
    )
    return doubles(product.x) @ (scales * unpacked(product) + biases).T


def bound(product: Product) -> Doubles:
    """How far a float32 sum in any order may lie from `result`, [M, N]: depth * 2^-24 * sum |x| (|s| q + |b|), and
    half a step of the output's type. The depth, additions in a chain, is at most K / 32 + 64."""
    scales, biases = (
        np.repeat(abs(doubles(a)), product.group_size, axis=1) for a in (product.scales, product.biases)
    )
    reach = abs(doubles(product.x)) @ (scales * unpacked(product) + biases).T
    depth = product.x.shape[1] / 32 + 64
    sums = depth * 2.0**-24 * reach
    return sums + UNIT[product.x.dtype] * (abs(result(product)) + sums)


def assert_close(y: mx.array, product: Product) -> None:
    """y lies within `bound` of `result`, everywhere."""
    assert y.shape == (product.x.shape[0], product.w.shape[0]) and y.dtype == product.x.dtype
    error = abs(doubles(y) - result(product))
    worst = (error / bound(product)).max()
    assert (error <= bound(product)).all(), f"{worst:.1f} times the bound"  # also false for NaN


def same_bits(ours: mx.array, theirs: mx.array) -> bool:
    """Equal shapes, dtypes and bits: tells zeros apart, and NaN is equal to itself."""
    if ours.shape != theirs.shape or ours.dtype != theirs.dtype:
        return False
    word = {2: mx.uint16, 4: mx.uint32}[ours.dtype.size]
    return bool(mx.array_equal(ours.view(word), theirs.view(word)).item())


def cancelling_product(
    rows: int, columns: int, size: int, group_size: int, bits: int, dtype: mx.Dtype, seed: int = 0
) -> Product:
    """A product whose exact result is zero: every term has its negative somewhere else in the sum.

    What comes out is nothing but the rounding errors of the sum, large enough for float16 to show them, so two
    orders of summation that differ anywhere give different bits.
    """
    rng = np.random.default_rng((seed, rows, columns, size, bits))
    half = rng.normal(size=(rows, size // 2)) * 64 * 2.0 ** rng.integers(-6, 7, (rows, size // 2))
    values = rng.integers(0, 2**bits, (columns, size // 2), dtype=np.uint32)
    places = rng.permutation(size)
    values = np.concatenate([values, values], axis=1)[:, places]
    per_word = 32 // bits
    shifts = np.arange(0, 32, bits, dtype=np.uint32)
    words = (values.reshape(columns, -1, per_word) << shifts).sum(axis=-1, dtype=np.uint32)
    groups = (columns, size // group_size)
    scales, biases = (np.repeat(a, groups[1], axis=1) for a in rng.normal(size=(2, columns, 1)))
    return Product(
        mx.array(np.concatenate([half, -half], axis=1)[:, places].astype(np.float32)).astype(dtype),
        mx.array(words),
        mx.array((scales * 4 / 2**bits).astype(np.float32)).astype(dtype),
        mx.array(biases.astype(np.float32)).astype(dtype),
        group_size,
        bits,
    )
