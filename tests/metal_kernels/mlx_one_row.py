"""MLX's own one-row quantised products: the text of its installed headers under emulation, itself on Metal."""

from __future__ import annotations

from functools import cache

import mlx.core as mx
import mslemu
from mslemu.mlx_kernels import quantized_kernel

from tests.metal_kernels.quantised import Product

_kernel = cache(quantized_kernel)
UNBATCHED = "k, n, k, nullptr, nullptr, k, nullptr, nullptr, nullptr, nullptr, threadgroup_position_in_grid"
SIMD = f"{UNBATCHED}, simdgroup_index_in_threadgroup, thread_index_in_simdgroup"
QUAD = f"{UNBATCHED}, quadgroup_index_in_threadgroup, thread_index_in_quadgroup"


def kernel_name(columns: int, size: int, bits: int) -> tuple[str, str]:
    """Which kernel MLX 0.32.4 runs for one row, and its template arguments after T, group size and bits.

    From the machine code of its macOS library (`dispatch_qmv`, `qmv`): whether the kernel is the fast one depends on
    K alone; for a number of columns that is no multiple of 8 it has a variant.
    """
    if size in (64, 128):
        return "affine_qmv_quad", f"{size}, false"
    if size % (2 * (32 // bits) * 32) == 0:
        return "affine_qmv_fast", "false, true" if columns % 8 else "false, false"
    return "affine_qmv", "false"


def _padded(array: mx.array) -> mx.array:
    """The same memory with 64 rows of zeros behind it. MLX's kernels take `device` memory only, and a buffer of fewer
    than 8 elements would not be; and qmv_quad reads the scales of up to 63 columns that do not exist."""
    return mx.concatenate([array, mx.zeros((64, array.shape[1]), array.dtype)]).reshape(-1)


def mlx_one_row(product: Product) -> mx.array:
    """`x @ dequantize(w).T`, every row by MLX's kernel for one row (its grid has one line of threadgroups per row).

    Not in check mode: where N is no multiple of 8, two threads of qmv write the same value to the same place.

    Args:
        product: what to compute, [M, K] by [N, K].

    Returns:
        [M, N] of x's dtype.
    """
    (rows, size), columns = product.x.shape, product.w.shape[0]
    if mx.metal.is_available():  # the kernel itself
        weights = {"scales": product.scales, "biases": product.biases}
        grid = {"group_size": product.group_size, "bits": product.bits}
        each = [
            mx.quantized_matmul(product.x[row : row + 1], product.w, **weights, **grid) for row in range(rows)
        ]
        return mx.concatenate(each)
    name, rest = kernel_name(columns, size, product.bits)
    template = f"T, {product.group_size}, {product.bits}, {rest}"
    simdgroups, tile = (1, 64) if name == "affine_qmv_quad" else (2, 8)
    buffers = [_padded(a) for a in (product.w, product.scales, product.biases, product.x)]
    with mslemu.options(mode="fast"):
        (y,) = _kernel(name, template, SIMD if simdgroups == 2 else QUAD)(
            inputs=[*buffers, mx.array([size, columns, rows], mx.int32)],
            template=[("T", product.x.dtype)],
            grid=(32 * rows, -(-columns // tile) * simdgroups, 1),
            threadgroup=(32, simdgroups, 1),
            output_shapes=[(rows, columns)],
            output_dtypes=[product.x.dtype],
        )
    return y
