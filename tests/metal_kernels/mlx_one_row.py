"""MLX's own one-row quantised products: the text of its installed headers, executed by the emulator."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import mlx.core as mx
import mslemu

from .quantised import Product

HEADER = """#include "mlx/backend/metal/kernels/steel/gemm/gemm.h"
#include "mlx/backend/metal/kernels/quantized_utils.h"
#include "mlx/backend/metal/kernels/quantized.h"
"""
UNBATCHED = "k, nullptr, nullptr, k, nullptr, nullptr, nullptr, nullptr"
SIMD = "simdgroup_index_in_threadgroup, thread_index_in_simdgroup"
QUAD = "quadgroup_index_in_threadgroup, thread_index_in_quadgroup"


def kernel_name(columns: int, size: int, bits: int) -> str:
    """Which kernel MLX 0.32.4 runs for one row, and its template arguments after T, group and bits.

    From the machine code of its macOS library (`dispatch_qmv`, `qmv`): the fast kernel depends on K alone, and
    has a variant for a number of columns that is no multiple of 8.
    """
    if size in (64, 128):
        return f"affine_qmv_quad<T, GROUP, BITS, {size}, false>"
    if size % (2 * (32 // bits) * 32) == 0:
        return f"affine_qmv_fast<T, GROUP, BITS, false, {'true' if columns % 8 else 'false'}>"
    return "affine_qmv<T, GROUP, BITS, false>"


@lru_cache(maxsize=None)
def _kernel(call: str) -> Any:
    lanes = QUAD if "quad" in call else SIMD
    body = f"""
  const constant int& k = dims[0];
  const constant int& n = dims[1];
  {call}(w, scales, biases, x, y, k, n, {UNBATCHED}, threadgroup_position_in_grid, {lanes});
"""
    return mslemu.metal_kernel(
        name="mlx_one_row",
        input_names=["w", "scales", "biases", "x", "dims"],
        output_names=["y"],
        source=body,
        header=HEADER,
    )


def mlx_one_row(product: Product, mode: str = "fast") -> mx.array:
    """`x @ dequantize(w).T`, every row by MLX's kernel for one row (its grid has one threadgroup column per row).

    Args:
        product: what to compute, [M, K] by [N, K].
        mode: of the emulator.

    Returns:
        [M, N] of x's dtype.
    """
    (rows, size), columns = product.x.shape, product.w.shape[0]
    call = kernel_name(columns, size, product.bits)
    simdgroups, tile = (1, 64) if "quad" in call else (2, 8)
    with mslemu.options(mode=mode):
        (y,) = _kernel(call)(
            inputs=[product.w, product.scales, product.biases, product.x, mx.array([size, columns], mx.int32)],
            template=[("T", product.x.dtype), ("GROUP", product.group_size), ("BITS", product.bits)],
            grid=(32 * rows, -(-columns // tile) * simdgroups, 1),
            threadgroup=(32, simdgroups, 1),
            output_shapes=[(rows, columns)],
            output_dtypes=[product.x.dtype],
        )
    return y
