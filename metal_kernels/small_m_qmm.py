"""A quantised matrix product for the 2 to 16 rows of a verification step, with one pass over the weights.

Contract: `x @ dequantize(w).T` for affine 4- or 8-bit weights in MLX's packed layout, with sums in float32. A row's
result does not depend on the number of rows. It is not bit for bit MLX's one-row product (see `row_exact`).
"""

from __future__ import annotations

import mlx.core as mx

from mtp_mlx.metal_kernels.launch import SMALL_INPUT, Factory, Launch, Support, read_kernel

BITS, GROUP_SIZES = (4, 8), (32, 64, 128)
DTYPES = (mx.float16, mx.bfloat16, mx.float32)
MIN_ROWS, MAX_ROWS = 2, 16
TILE, THREADS = 16, 128  # columns of y and threads per threadgroup

# Largest difference from MLX, relative to the largest result. MLX's CPU product sums in the type of x.
TOLERANCE = {mx.float32: 1e-5, mx.float16: 2e-3, mx.bfloat16: 1.6e-2}
CPU_TOLERANCE = {mx.float32: 1e-5, mx.float16: 2e-2, mx.bfloat16: 1.6e-1}

TEXT = read_kernel("small_m_qmm", ("x", "w", "scales", "biases"), ("y",))


def why_not(
    x: mx.array,
    w: mx.array,
    scales: mx.array,
    biases: mx.array | None,
    group_size: int,
    bits: int,
    mode: str = "affine",
) -> str:
    """Why the kernel does not support a call (a clause with both numbers); "" if it does. Arguments as in `run`."""
    if mode != "affine" or biases is None:
        return f"the mode is {mode}, not affine" if mode != "affine" else "there are no biases"
    if bits not in BITS or group_size not in GROUP_SIZES:
        return f"{bits} bits in groups of {group_size}; supported are {BITS} bits in groups of {GROUP_SIZES}"
    if x.ndim != 2 or w.ndim != 2:
        return f"x and w have {x.ndim} and {w.ndim} dimensions, not 2"
    if x.dtype not in DTYPES or scales.dtype != x.dtype or biases.dtype != x.dtype:
        return f"x, scales and biases are {x.dtype}, {scales.dtype} and {biases.dtype}"
    if w.dtype != mx.uint32:
        return f"w is {w.dtype}, not uint32"
    (rows, size), (columns, words) = x.shape, w.shape
    if not MIN_ROWS <= rows <= MAX_ROWS:
        return f"{rows} rows, not {MIN_ROWS} to {MAX_ROWS}"
    if size == 0 or size % group_size:
        return f"{size} values per row of x are not a multiple of the group size {group_size}"
    if words * 32 != size * bits:
        return f"{words} words per row of w, but {size} values per row of x need {size * bits / 32:g}"
    groups = (columns, size // group_size)
    if scales.shape != groups or biases.shape != groups:
        return f"scales and biases are {scales.shape} and {biases.shape}, not {groups}"
    if w.size < SMALL_INPUT:
        return f"w has {w.size} words, fewer than {SMALL_INPUT}"
    return ""


def supported(
    x: mx.array,
    w: mx.array,
    scales: mx.array,
    biases: mx.array | None,
    group_size: int,
    bits: int,
    mode: str = "affine",
) -> Support:
    """Whether the kernel supports this call, by shapes and dtypes. Arguments as in `run`."""
    reason = why_not(x, w, scales, biases, group_size, bits, mode)
    return Support(not reason, reason)


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
        raise ValueError(f"small_m_qmm: {reason}")
    rows, columns = x.shape[0], w.shape[0]
    return Launch(
        text=TEXT,
        inputs=(x, w, scales, biases),
        template=(("T", x.dtype), ("BITS", bits), ("GROUP", group_size), ("ROWS", rows)),
        grid=(-(-columns // TILE) * THREADS, 1, 1),
        threadgroup=(THREADS, 1, 1),
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
    """`x @ dequantize(w).T` in one launch.

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
    """MLX's product. Arguments and result as in `run`."""
    return mx.quantized_matmul(
        x, w, scales, biases, transpose=True, group_size=group_size, bits=bits, mode=mode
    )


def sample(
    rows: int, columns: int, size: int, group_size: int, bits: int, dtype: mx.Dtype, seed: int
) -> tuple[mx.array, mx.array, mx.array, mx.array, int, int]:
    """Random arguments for `run`; does not touch MLX's global random state."""
    x_key, w_key = mx.random.split(mx.random.key(seed))
    x = mx.random.normal((rows, size), key=x_key).astype(dtype)
    dense = mx.random.normal((columns, size), key=w_key).astype(dtype)
    w, scales, biases = mx.quantize(dense, group_size=group_size, bits=bits)
    return x, w, scales, biases, group_size, bits


def samples() -> list[tuple[mx.array, mx.array, mx.array, mx.array, int, int]]:
    """Sample calls for the self-check: every dtype, bit width and group size; K and N that fill the tiles or not."""
    return [
        sample(2, 19, 96, 32, 4, mx.float32, 0),
        sample(5, 33, 576, 64, 4, mx.float16, 1),
        sample(8, 48, 640, 128, 8, mx.bfloat16, 2),
        sample(16, 7, 544, 32, 8, mx.float16, 3),
    ]


def agrees(ours: mx.array, theirs: mx.array) -> bool:
    """Whether `run` and `reference` agree within TOLERANCE, or CPU_TOLERANCE if the reference ran on the CPU."""
    on_gpu = mx.default_device().type == mx.DeviceType.gpu
    tolerance = (TOLERANCE if on_gpu else CPU_TOLERANCE)[theirs.dtype]
    if ours.shape != theirs.shape or ours.dtype != theirs.dtype:
        return False
    ours, theirs = ours.astype(mx.float32), theirs.astype(mx.float32)
    return bool((mx.abs(ours - theirs).max() <= tolerance * mx.abs(theirs).max()).item())


def shape_key(
    x: mx.array,
    w: mx.array,
    scales: mx.array,
    biases: mx.array | None,
    group_size: int,
    bits: int,
    mode: str = "affine",
) -> str:
    """The class of a call: bit width, group size, dtype, rows x columns x values."""
    dtype = str(x.dtype).rsplit(".", 1)[-1]
    return f"q{bits} g{group_size} {dtype} {x.shape[0]}x{w.shape[0]}x{x.shape[-1]}"
