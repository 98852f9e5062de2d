"""Kernels built from MLX's own Metal functions, whose headers are in the installed wheel.

MLX's kernels are known to be right on Apple GPUs. So their results under emulation show that the emulator is right,
and their bits are those that a replacement kernel must give. (The order of a simdgroup's sum is the emulator's on
both sides: see tools/README.md.)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import mlx.core as mx

from .headers import KERNELS
from .kernel import MetalKernel, metal_kernel

_QUANTIZED_HEADERS = ("steel/gemm/gemm.h", "quantized_utils.h", "quantized.h")
_COLUMNS_PER_THREADGROUP = 8  # of affine_qmv and affine_qmv_fast: 2 simdgroups of 4


def mlx_kernel(
    name: str,
    headers: Sequence[str],
    input_names: Sequence[str],
    output_names: Sequence[str],
    source: str,
    function_constants: Mapping[int, int] | None = None,
) -> MetalKernel:
    """A kernel whose body calls functions from MLX's headers.

    Args:
        headers: paths below mlx/backend/metal/kernels.
        source: the body; an MLX function that takes `const constant int&` needs an input of fewer than 8 elements.
        function_constants: values of `[[function_constant(n)]]` by n; all others are 0.
    """
    lines = [f"#define MSL_FC_{number} {int(value)}" for number, value in (function_constants or {}).items()]
    lines += [f'#include "{KERNELS.as_posix()}/{header}"' for header in headers]
    return metal_kernel(name, input_names, output_names, source, header="\n".join(lines) + "\n")


def quantized_kernel(function: str, template: str, arguments: str) -> MetalKernel:
    """A kernel that calls `function<template>` of MLX's quantized.h.

    Its inputs are w, scales, biases, x and dims (int32: K, N, M), its output is y, its template argument T.
    `arguments` follow `w, scales, biases, x, y`; in them k, n and m stand for the three numbers.
    """
    source = (
        "  const constant int& k = dims[0]; const constant int& n = dims[1]; const constant int& m = dims[2];\n"
        f"  (void)m; {function}<{template}>(w, scales, biases, x, y, {arguments});\n"
    )
    inputs = ("w", "scales", "biases", "x", "dims")
    return mlx_kernel(f"mlx_{function}", _QUANTIZED_HEADERS, inputs, ("y",), source)


def quantized_matvec(
    x: mx.array, w: mx.array, scales: mx.array, biases: mx.array, *, group_size: int, bits: int, fast: bool
) -> mx.array:
    """x @ dequantize(w).T [M, N], computed row by row by MLX's own kernel for single rows.

    Args:
        x: [M, K], with the dtype of scales and biases.
        w, scales, biases: from `mx.quantize`, N rows.
        fast: use affine_qmv_fast, which needs N to be a multiple of 8 and K of its block; else affine_qmv.
    """
    rows, columns = x.shape[0], w.shape[0]
    unbatched = "k, nullptr, nullptr, k, nullptr, nullptr, nullptr, nullptr"
    place = "threadgroup_position_in_grid, simdgroup_index_in_threadgroup, thread_index_in_simdgroup"
    function = "affine_qmv_fast" if fast else "affine_qmv"
    kernel = quantized_kernel(function, f"T, {group_size}, {bits}, false", f"k, n, {unbatched}, {place}")
    groups = -(-columns // _COLUMNS_PER_THREADGROUP)
    return kernel(
        inputs=[w, scales, biases, x, mx.array([x.shape[1], columns, rows], dtype=mx.int32)],
        template=[("T", x.dtype)],
        grid=(rows * 32, groups * 2, 1),
        threadgroup=(32, 2, 1),
        output_shapes=[(rows, columns)],
        output_dtypes=[x.dtype],
    )[0]
