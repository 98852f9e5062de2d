"""The low-rank update of a linear layer, on slot rows only: y + scale * (x @ down) @ up.

Contract: rows from `n_real` on are slot rows, at most 32 of them. The kernel reads no byte of x or y before them and
computes nothing for them, so real rows cost nothing. Rank up to 256. Sums in float32, rounded once at the end.

There are one or two launches, depending on the bytes moved. In a single launch, each of G threadgroups computes x @
down by itself and then its own columns of the result (512, or more if G would exceed 8), so `down` and x are read G
times. With two launches both factors are read once, but the float32 product between them is written and read back,
and the second launch waits for the first, which counts as `WAIT_BYTES`. So, roughly, one launch is used if (G - 1)
* (bytes of `down` and of x's slot rows) <= WAIT_BYTES. With 16 bits and 8 slot rows: 576 x 1536 at every rank, 2048
x 2048 up to rank 41, 4096 x 14336 only at rank 1.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import mlx.core as mx

from mtp_mlx.metal_kernels.launch import SMALL_INPUT, Factory, Launch, Support, read_kernel

FUSED = read_kernel("gated_lora", ("x", "y", "down", "up", "scale", "numbers"), ("out",))
DOWN = replace(read_kernel("gated_lora_down", ("x", "down", "numbers"), ("hidden",)), header=FUSED.header)
UP = replace(
    read_kernel("gated_lora_up", ("hidden", "y", "up", "scale", "numbers"), ("out",)), header=FUSED.header
)

DTYPES = (mx.float32, mx.float16, mx.bfloat16)
MAX_RANK = 256
SLOT_COUNTS = (4, 8, 16, 32)  # the compiled variants; a call uses the smallest that holds its slot rows
THREADS = 256
DEPTH = 64  # inputs of x held in threadgroup memory at a time
MIN_COLUMNS, MAX_READERS = 512, 8  # single launch: fewest columns per threadgroup, most threadgroups
RANK_TILE = 64  # columns of `down` per threadgroup of the first launch
MAX_PARTS = 16  # slices of the inputs in the first launch
THREADGROUP_BYTES = 32768
WAIT_BYTES = 1 << 19  # an estimate: 2 us at 250 GB/s; the race on the user's machine decides


def _slots(count: int) -> int:
    return next(slots for slots in SLOT_COUNTS if slots >= count)


def _threadgroup_bytes(slots: int, rank: int) -> int:
    """Threadgroup memory of the single launch: a tile of x, the partial sums of the threads, x @ down."""
    return 4 * (DEPTH * slots + min(slots, 8) * THREADS + rank * slots)


def _columns(outputs: int) -> int:
    """Columns per threadgroup of the single launch, a multiple of its threads."""
    return max(MIN_COLUMNS, THREADS * -(-outputs // (MAX_READERS * THREADS)))


def _parts(slots: int, inputs: int, outputs: int, itemsize: int) -> int:
    """Number of slices of the inputs: many, to keep the GPU busy, but their products cost at most half of `down`."""
    readers = -(-outputs // THREADS)
    affordable = inputs * itemsize // (2 * 4 * slots * (1 + readers))
    return max(1, min(affordable, MAX_PARTS, -(-inputs // DEPTH)))


def bytes_moved(slots: int, inputs: int, outputs: int, rank: int, itemsize: int) -> tuple[int, int]:
    """Bytes read and written by (one launch, two launches)."""
    ends = itemsize * (rank * outputs + 2 * slots * outputs)  # up, y, the result
    x, down = itemsize * slots * inputs, itemsize * inputs * rank
    hidden = 4 * slots * rank * _parts(slots, inputs, outputs, itemsize)
    one = -(-outputs // _columns(outputs)) * (x + down) + ends
    two = -(-rank // RANK_TILE) * x + down + (1 + -(-outputs // THREADS)) * hidden + ends
    return one, two


def takes_one_launch(slots: int, inputs: int, outputs: int, rank: int, itemsize: int) -> bool:
    """Whether to use one launch; the rule is in the module's docstring."""
    if _threadgroup_bytes(_slots(slots), rank) > THREADGROUP_BYTES:
        return False
    one, two = bytes_moved(slots, inputs, outputs, rank, itemsize)
    return one <= two + WAIT_BYTES


def supported(x: mx.array, y: mx.array, down: mx.array, up: mx.array, n_real: int, scale: float) -> Support:
    """Whether the kernel supports this call, by shapes and dtypes. Arguments as in `run`."""
    if x.dtype not in DTYPES:
        return Support(False, f"activations are {x.dtype}")
    if any(a.dtype != x.dtype for a in (y, down, up)):
        return Support(False, f"activations are {x.dtype}, others {y.dtype}, {down.dtype}, {up.dtype}")
    if down.shape[-1] > MAX_RANK:
        return Support(False, f"rank {down.shape[-1]} is more than {MAX_RANK}")
    if x.shape[-2] - n_real > SLOT_COUNTS[-1]:
        return Support(False, f"{x.shape[-2] - n_real} slot rows are more than {SLOT_COUNTS[-1]}")
    if min(a.size for a in (x, y, down, up)) < SMALL_INPUT:
        return Support(False, f"fewer than {SMALL_INPUT} elements")
    return Support(True)


def _check(x: mx.array, y: mx.array, down: mx.array, up: mx.array, n_real: int, scale: float) -> None:
    """Raise ValueError, with both numbers, for anything the launches do not support."""
    if any(a.ndim != 2 for a in (x, y, down, up)):
        raise ValueError(
            f"x, y, down and up must have two dimensions, got {[a.ndim for a in (x, y, down, up)]}"
        )
    rows, inputs = x.shape
    if not 0 <= n_real < rows:
        raise ValueError(f"n_real is {n_real}, but at least one of the {rows} rows must be a slot row")
    if y.shape[0] != rows:
        raise ValueError(f"x has {rows} rows, but y has {y.shape[0]}")
    if down.shape[0] != inputs:
        raise ValueError(f"x has {inputs} columns, but down has {down.shape[0]} rows")
    if up.shape != (down.shape[1], y.shape[1]):
        raise ValueError(f"up must be [{down.shape[1]}, {y.shape[1]}], got {list(up.shape)}")
    support = supported(x, y, down, up, n_real, scale)
    if not support:
        raise ValueError(support.reason)


def _numbers(*values: int) -> mx.array:
    return mx.array(values, dtype=mx.int32)


def launch(x: mx.array, y: mx.array, down: mx.array, up: mx.array, n_real: int, scale: float) -> Launch:
    """The single launch, with output [R - n_real, outputs] of x's type. Arguments as in `run`.

    Raises:
        ValueError: if shapes or types do not match, or x @ down does not fit threadgroup memory.
    """
    _check(x, y, down, up, n_real, scale)
    (rows, inputs), (rank, outputs) = x.shape, up.shape
    slots = _slots(rows - n_real)
    needed, columns = _threadgroup_bytes(slots, rank), _columns(outputs)
    if needed > THREADGROUP_BYTES:
        raise ValueError(f"{needed} bytes of threadgroup memory are more than {THREADGROUP_BYTES}")
    return Launch(
        FUSED,
        (x, y, down, up, mx.array([scale], mx.float32), _numbers(rows, n_real, inputs, outputs, columns)),
        (("T", x.dtype), ("RANK", rank), ("SLOTS", slots)),
        (THREADS * -(-outputs // columns), 1, 1),
        (THREADS, 1, 1),
        ((rows - n_real, outputs),),
        (x.dtype,),
    )


def launch_down(x: mx.array, y: mx.array, down: mx.array, up: mx.array, n_real: int, scale: float) -> Launch:
    """The first of two launches, with output [parts, R - n_real, rank] float32. Arguments and errors as in `run`."""
    _check(x, y, down, up, n_real, scale)
    (rows, inputs), (rank, outputs) = x.shape, up.shape
    slots = rows - n_real
    slices = -(-inputs // DEPTH)
    per_part = DEPTH * -(-slices // _parts(slots, inputs, outputs, x.dtype.size))
    parts = -(-inputs // per_part)
    return Launch(
        DOWN,
        (x, down, _numbers(rows, n_real, inputs, rank, per_part)),
        (("T", x.dtype), ("SLOTS", _slots(slots))),
        (THREADS * parts, -(-rank // RANK_TILE), 1),
        (THREADS, 1, 1),
        ((parts, slots, rank),),
        (mx.float32,),
    )


def launch_up(hidden: mx.array, y: mx.array, up: mx.array, n_real: int, scale: float) -> Launch:
    """The second of two launches, with output [R - n_real, outputs] of y's type.

    Args:
        hidden: [parts, R - n_real, rank] float32, the output of `launch_down`.
        y, up, n_real, scale: as in `run`.

    Raises:
        ValueError: if shapes or types do not match.
    """
    rows, outputs = y.shape
    parts, slots, rank = hidden.shape
    if slots != rows - n_real or up.shape != (rank, outputs) or hidden.dtype != mx.float32:
        raise ValueError(
            f"hidden {list(hidden.shape)} {hidden.dtype} does not match {rows - n_real} rows and up {list(up.shape)}"
        )
    return Launch(
        UP,
        (hidden, y, up, mx.array([scale], mx.float32), _numbers(rows, n_real, rank, outputs, parts)),
        (("T", y.dtype), ("SLOTS", _slots(slots))),
        (THREADS * -(-outputs // THREADS), 1, 1),
        (THREADS, 1, 1),
        ((slots, outputs),),
        (y.dtype,),
    )


def run(
    factory: Factory, x: mx.array, y: mx.array, down: mx.array, up: mx.array, n_real: int, scale: float
) -> mx.array:
    """The slot rows of the layer's result.

    Args:
        factory: builds kernels (`mx.fast.metal_kernel`).
        x: [R, inputs], the layer's input.
        y: [R, outputs], the base layer's result.
        down, up: [inputs, rank] and [rank, outputs], of x's type.
        n_real: first slot row; at most 32 rows follow.
        scale: alpha / rank.

    Returns:
        [R - n_real, outputs] of x's type.

    Raises:
        ValueError: if shapes or types do not match.
    """
    _check(x, y, down, up, n_real, scale)
    if takes_one_launch(x.shape[0] - n_real, x.shape[1], y.shape[1], down.shape[1], x.dtype.size):
        (out,) = launch(x, y, down, up, n_real, scale).run(factory)
    else:
        (hidden,) = launch_down(x, y, down, up, n_real, scale).run(factory)
        (out,) = launch_up(hidden, y, up, n_real, scale).run(factory)
    return out


def reference(x: mx.array, y: mx.array, down: mx.array, up: mx.array, n_real: int, scale: float) -> mx.array:
    """The same with MLX's operations. Arguments and result as in `run`."""
    return mx.addmm(y[n_real:], x[n_real:] @ down, up, alpha=scale)


def in_place(factory: Factory, arguments: tuple[Any, ...]) -> tuple[Any, Any]:
    """What a layer runs with the kernel (then it joins the rows) and without (one fused product over all rows)."""
    n_real, scale = arguments[4:]

    def with_kernel(x: mx.array, y: mx.array, down: mx.array, up: mx.array, *_: Any) -> mx.array:
        return mx.concatenate([y[:n_real], run(factory, x, y, down, up, n_real, scale)])

    def without(x: mx.array, y: mx.array, down: mx.array, up: mx.array, *_: Any) -> mx.array:
        hidden = mx.pad(x[n_real:] @ down, [(n_real, 0), (0, 0)])
        return mx.addmm(y, hidden, up, alpha=scale)

    return with_kernel, without


def samples() -> list[tuple[Any, ...]]:
    """Sample calls for the self-check: every type, one and two launches, ranks and rows that do not fill tiles."""
    cases = (
        (mx.float32, 200, 700, 12, 5, 3),
        (mx.float16, 576, 1536, 16, 9, 0),
        (mx.bfloat16, 320, 130, 100, 19, 2),
        (mx.float16, 1024, 2100, 256, 8, 4),
        (mx.bfloat16, 2048, 2048, 96, 6, 1),
    )
    return [_sample(*case) for case in cases]


def _sample(dtype: mx.Dtype, inputs: int, outputs: int, rank: int, rows: int, n_real: int) -> tuple[Any, ...]:
    """A call with random numbers; the base result and the update are of similar size."""
    parts = mx.random.split(mx.random.key(rank), 4)
    shapes = ((rows, inputs), (rows, outputs), (inputs, rank), (rank, outputs))
    x, y, down, up = (mx.random.normal(shape, key=part) for shape, part in zip(shapes, parts))
    arrays = (x, y, down * inputs**-0.5, up * rank**-0.5)
    return *(a.astype(dtype) for a in arrays), n_real, 0.5


def agrees(ours: mx.array, theirs: mx.array) -> bool:
    """Whether two results differ only by rounding: by at most 1e-5 (float32), 4e-3 (float16) or 3e-2 (bfloat16, to
    which MLX rounds x @ down between its two steps) of the largest value."""
    bound = {mx.float32: 1e-5, mx.float16: 4e-3, mx.bfloat16: 3e-2}[theirs.dtype]
    ours, theirs = ours.astype(mx.float32), theirs.astype(mx.float32)
    return bool((mx.abs(ours - theirs).max() <= bound * mx.abs(theirs).max()).item())


def shape_key(x: mx.array, y: mx.array, down: mx.array, up: mx.array, n_real: int, scale: float) -> str:
    """The class of a call in the cache of verdicts: type, slot rows, rank and sizes."""
    dtype = str(x.dtype).rsplit(".", 1)[-1]
    return f"{dtype} {x.shape[0] - n_real}x{x.shape[1]}x{y.shape[1]} rank {down.shape[1]}"
