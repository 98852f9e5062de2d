"""Kernels made of MLX's own Metal functions, which the installed wheel carries as headers.

MLX's kernels are known good on Apple GPUs: what they compute under emulation shows that the emulator is right, and
what bits they yield is what a kernel that stands in for one must yield. (The order of a simdgroup's sum is the
emulator's on both sides: see tools/README.md.)
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
    """A kernel whose body calls functions of MLX's headers.

    Args:
        headers: paths below mlx/backend/metal/kernels.
        source: the body; a function of MLX that takes `const constant int&` wants an input of fewer than 8 elements.
        function_constants: values of `[[function_constant(n)]]` by n; the others are 0.
    """
    lines = [f"#define MSL_FC_{number} {int(value)}" for number, value in (function_constants or {}).items()]
    lines += [f'#include "{KERNELS.as_posix()}/{header}"' for header in headers]
    return metal_kernel(name, input_names, output_names, source, header="\n".join(lines) + "\n")


def quantized_kernel(function: str, template: str, arguments: str) -> MetalKernel:
    """A kernel that calls `function<template>` of MLX's quantized.h.

    Its inputs are w, scales, biases, x and dims (int32: K, N, M), its output y, its template argument T. `arguments`
    are what follows `w, scales, biases, x, y`, where k, n and m are the three numbers.
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
    """x @ dequantize(w).T [M, N] as MLX's own kernel for single rows computes it, row by row.

    Args:
        x: [M, K], in the dtype of scales and biases.
        w, scales, biases: of `mx.quantize`, N rows.
        fast: by affine_qmv_fast, which needs N a multiple of 8 and K of its block; else by affine_qmv.
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
