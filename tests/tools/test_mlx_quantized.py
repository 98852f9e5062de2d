"""MLX's own quantised matmul kernels, unmodified from the wheel, run clean under every check and are right."""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx
import mslemu
import numpy as np
import pytest
from mslemu.mlx_kernels import quantized_kernel, quantized_matvec

RNG = np.random.default_rng(0)
DTYPES = {"f32": mx.float32, "f16": mx.float16, "bf16": mx.bfloat16}
BOUNDS = {mx.float32: 1e-5, mx.float16: 2e-3, mx.bfloat16: 1e-2}

UNBATCHED = "k, nullptr, nullptr, k, nullptr, nullptr, nullptr, nullptr"
SIMD_PLACE = "threadgroup_position_in_grid, simdgroup_index_in_threadgroup, thread_index_in_simdgroup"
QUAD_PLACE = "threadgroup_position_in_grid, quadgroup_index_in_threadgroup, thread_index_in_quadgroup"
TILE_PLACE = SIMD_PLACE.replace(",", ", thread_index_in_threadgroup,", 1)


@dataclass(frozen=True)
class Problem:
    """x [rows, depth] times 4-bit weights [columns, depth] in groups of 64."""

    rows: int
    depth: int
    columns: int
    dtype: mx.Dtype
    bits: int = 4

    def arrays(self) -> tuple[mx.array, mx.array, mx.array, mx.array]:
        x = mx.array(RNG.normal(size=(self.rows, self.depth)).astype(np.float32)).astype(self.dtype)
        weights = mx.array((RNG.normal(size=(self.columns, self.depth)) * 0.05).astype(np.float32))
        return x, *mx.quantize(weights.astype(self.dtype), group_size=64, bits=self.bits)

    def assert_right(
        self, got: mx.array, x: mx.array, w: mx.array, scales: mx.array, biases: mx.array
    ) -> None:
        """In float32: MLX's CPU path accumulates in the type of x."""
        weights = mx.dequantize(
            w, scales.astype(mx.float32), biases.astype(mx.float32), group_size=64, bits=self.bits
        )
        want = np.array(x.astype(mx.float32), np.float64) @ np.array(weights, np.float64).T
        error = np.abs(np.array(got.astype(mx.float32)) - want).max() / np.abs(want).max()
        assert error < BOUNDS[self.dtype]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "fast,rows,depth,columns", [(True, 3, 1024, 64), (False, 2, 320, 60)], ids=["fast", "any"]
)
def test_qmv(dtype: str, fast: bool, rows: int, depth: int, columns: int) -> None:
    problem = Problem(rows, depth, columns, DTYPES[dtype], bits=8 if dtype == "f16" else 4)
    arrays = problem.arrays()
    problem.assert_right(quantized_matvec(*arrays, group_size=64, bits=problem.bits, fast=fast), *arrays)


@dataclass(frozen=True)
class OwnKernel:
    """How MLX launches one of its kernels (mlx/backend/metal/quantized.cpp)."""

    template: str
    arguments: str
    rows: int
    depth: int
    columns: int
    grid: tuple[int, int, int]
    threadgroup: tuple[int, int, int]


OWN = {
    "affine_qmv_quad": OwnKernel(
        "T, 64, 4, 128, false", f"k, n, {UNBATCHED}, {QUAD_PLACE}", 2, 128, 128, (2 * 32, 128 // 64, 1), (32, 1, 1)
    ),
    "affine_qmv_wide": OwnKernel(
        "T, 64, 4, 5, 8, false", f"k, n, m, {UNBATCHED}, {SIMD_PLACE}", 5, 1024, 64, (32, 64 // 8 * 2, 1), (32, 2, 1)
    ),
    "affine_qmm_t": OwnKernel(
        "T, 64, 4, true, false", f"k, n, m, {UNBATCHED}, {TILE_PLACE}", 40, 256, 96, (96, 2 * 2, 2), (32, 2, 2)
    ),
}  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("function", OWN)
def test_other_matmuls(function: str, dtype: str) -> None:
    own = OWN[function]
    problem = Problem(own.rows, own.depth, own.columns, DTYPES[dtype])
    x, w, scales, biases = problem.arrays()
    kernel = quantized_kernel(function, own.template, own.arguments)
    # affine_qmm_t copies structs out of device memory, which the compile with distinct address spaces refuses
    with mslemu.options(address_spaces=function != "affine_qmm_t"):
        got = kernel(
            inputs=[w, scales, biases, x, mx.array([own.depth, own.columns, own.rows], dtype=mx.int32)],
            template=[("T", x.dtype)],
            grid=own.grid,
            threadgroup=own.threadgroup,
            output_shapes=[(own.rows, own.columns)],
            output_dtypes=[x.dtype],
        )[0]
    problem.assert_right(got, x, w, scales, biases)
