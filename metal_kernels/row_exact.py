"""A quantised matrix product for 2 to 16 rows in which every row equals MLX's one-row product bit for bit.

Contract: on a Mac, row i equals `mx.quantized_matmul` of row i alone, bit for bit, so quantised greedy decoding that
verifies with this kernel equals plain decoding by construction. Weights are read once for all rows. The order of the
sums is that of MLX 0.32.4. `agrees` compares bits on a GPU, so a version of MLX with another order (it has changed
between releases) fails the self-check.
"""

from __future__ import annotations

from typing import NamedTuple

import mlx.core as mx

from mtp_mlx.metal_kernels import small_m_qmm
from mtp_mlx.metal_kernels.launch import Factory, Launch, read_kernel
from mtp_mlx.metal_kernels.small_m_qmm import sample, shape_key, why_not

__all__ = ["agrees", "launch", "one_row_order", "reference", "run", "samples", "shape_key", "supported"]

SIMDGROUPS = 2  # per threadgroup

TEXT = read_kernel("row_exact", ("x", "w", "scales", "biases"), ("y",))


class Order(NamedTuple):
    """The order in which MLX sums the product of a row and a column.

    Attributes:
        lanes: lanes that share a column: 32 or 4.
        values: consecutive values of K per lane and turn.
    """

    lanes: int
    values: int


def one_row_order(size: int, bits: int) -> Order:
    """The order that MLX 0.32.4 uses for one row of `size` values, following its dispatch.

    qmv_quad for 64 and 128 values; qmv_fast if `size` is a multiple of 64 words (512 values of 4 bits, 256 of 8),
    for any number of columns; qmv otherwise.
    """
    per_word = 32 // bits
    if size in (64, 128):
        return Order(4, size // 4)
    return Order(32, 2 * per_word if size % (64 * per_word) == 0 else per_word)


supported = small_m_qmm.supported  # both kernels support the same calls


def launch(
    x: mx.array,
    w: mx.array,
    scales: mx.array,
    biases: mx.array | None,
    group_size: int,
    bits: int,
    mode: str = "affine",
) -> Launch:
    """The launch. Arguments as in `run`.

    Raises:
        ValueError: if the kernel does not support the call.
    """
    reason = why_not(x, w, scales, biases, group_size, bits, mode)
    if reason or biases is None:
        raise ValueError(f"row_exact: {reason}")
    (rows, size), columns = x.shape, w.shape[0]
    order = one_row_order(size, bits)
    tile = SIMDGROUPS * (4 if order.lanes == 32 else 8)  # columns of y per threadgroup
    return Launch(
        text=TEXT,
        inputs=(x, w, scales, biases),
        template=(
            ("T", x.dtype),
            ("BITS", bits),
            ("GROUP", group_size),
            ("ROWS", rows),
            ("LANES", order.lanes),
            ("VALUES", order.values),
        ),
        grid=(-(-columns // tile) * SIMDGROUPS * 32, 1, 1),
        threadgroup=(SIMDGROUPS * 32, 1, 1),
        output_shapes=((rows, columns),),
        output_dtypes=(x.dtype,),
    )


def run(
    factory: Factory,
    x: mx.array,
    w: mx.array,
    scales: mx.array,
    biases: mx.array | None,
    group_size: int,
    bits: int,
    mode: str = "affine",
) -> mx.array:
    """`x @ dequantize(w).T` in one launch, each row as if it were alone.

    Args:
        factory: builds kernels (`mx.fast.metal_kernel`).
        x: [M, K] float16, bfloat16 or float32; M is 2 to 16, K a multiple of group_size.
        w: [N, K * bits / 32] uint32, as `mx.quantize` packs it.
        scales, biases: [N, K / group_size], of x's dtype.
        group_size: 32, 64 or 128.
        bits: 4 or 8.
        mode: must be "affine".

    Returns:
        [M, N] of x's dtype.

    Raises:
        ValueError: for anything else.
    """
    return launch(x, w, scales, biases, group_size, bits, mode).run(factory)[0]


def reference(
    x: mx.array,
    w: mx.array,
    scales: mx.array,
    biases: mx.array | None,
    group_size: int,
    bits: int,
    mode: str = "affine",
) -> mx.array:
    """MLX's product of every row on its own. Arguments and result as in `run`."""
    return mx.concatenate(
        [small_m_qmm.reference(row[None], w, scales, biases, group_size, bits, mode) for row in x], axis=0
    )


def samples() -> list[tuple[mx.array, mx.array, mx.array, mx.array, int, int]]:
    """Sample calls for the self-check: all three of MLX's kernels, both bit widths, every dtype and group size."""
    return [
        sample(2, 19, 512, 32, 4, mx.float32, 0),
        sample(5, 40, 1536, 64, 4, mx.float16, 1),
        sample(4, 11, 576, 64, 4, mx.bfloat16, 2),
        sample(7, 16, 256, 128, 8, mx.float16, 3),
        sample(3, 9, 640, 32, 8, mx.float32, 4),
        sample(16, 21, 64, 32, 4, mx.float32, 5),
        sample(8, 70, 128, 128, 8, mx.bfloat16, 6),
    ]


def agrees(ours: mx.array, theirs: mx.array) -> bool:
    """Whether `run` and `reference` agree: bit for bit on a GPU. MLX's CPU product sums in another order and in the
    type of x, so on the CPU this is `small_m_qmm.agrees`."""
    if mx.default_device().type != mx.DeviceType.gpu:
        return small_m_qmm.agrees(ours, theirs)
    if ours.shape != theirs.shape or ours.dtype != theirs.dtype:
        return False
    word = {2: mx.uint16, 4: mx.uint32}[ours.dtype.size]
    return bool(mx.array_equal(ours.view(word), theirs.view(word)).item())
