"""MLX's own vector attention kernels, unmodified from the wheel, run clean under every check and are right."""

from __future__ import annotations

from collections.abc import Mapping

import mlx.core as mx
import numpy as np
import pytest
from mslemu import MetalKernel
from mslemu.mlx_kernels import mlx_kernel

HEADERS = ("sdpa_vector.h",)
QUERY_HEADS, KEY_HEADS, KEYS, SIZE = 4, 2, 70, 64
SCALE = SIZE**-0.5
BLOCKS = 32  # of keys, in the two-pass kernels
BOUNDS = {mx.float32: 2e-6, mx.float16: 3e-3, mx.bfloat16: 3e-2}
RNG = np.random.default_rng(0)

# what MLX sets when it loads the kernel (sdpa_vector.h)
HAS_MASK, CAUSAL, BOOL_MASK, FLOAT_MASK, BLOCK_COUNT = 20, 22, 23, 24, 26
KINDS: dict[str, Mapping[int, int]] = {
    "none": {},
    "causal": {CAUSAL: 1},
    "bool": {HAS_MASK: 1, BOOL_MASK: 1},
    "float": {HAS_MASK: 1, FLOAT_MASK: 1},
}
# every mask and dtype, not their product: each pair compiles anew
CASES = [
    *((kind, mx.float32) for kind in KINDS),
    ("none", mx.float16),
    ("bool", mx.float16),
    ("causal", mx.bfloat16),
    ("float", mx.bfloat16),
]

INPUTS = ("q", "k", "v", "dims", "strides", "scale", "bool_mask", "float_mask")
STRIDES = """
  const constant size_t& head_stride = (const constant size_t&)strides[0];
  const constant size_t& row_stride = (const constant size_t&)strides[1];
"""
# dims: queries per key head, keys, strides of the mask by query, head and key, query heads
COMMON = (
    "head_stride, row_stride, head_stride, row_stride, scale[0], bool_mask, float_mask, "
    "dims[4], dims[2], dims[3], nullptr"
)
PLACE = "threadgroup_position_in_grid, threadgroups_per_grid"


def one_pass(kind: str) -> MetalKernel:
    call = (
        f"sdpa_vector<T, {SIZE}, {SIZE}>(q, k, v, out, dims[0], dims[1], {COMMON}, dims[5], {PLACE}, "
        "simdgroup_index_in_threadgroup, thread_index_in_simdgroup);"
    )
    return mlx_kernel("mlx_sdpa_vector", HEADERS, INPUTS, ("out",), STRIDES + call, KINDS[kind])


def first_pass(kind: str) -> MetalKernel:
    call = (
        f"sdpa_vector_2pass_1<T, {SIZE}, {SIZE}>(q, k, v, out, sums, maxs, dims[1], {COMMON}, "
        f"threads_per_threadgroup, thread_position_in_threadgroup, {PLACE}, thread_index_in_simdgroup);"
    )
    constants = {**KINDS[kind], BLOCK_COUNT: BLOCKS}
    return mlx_kernel("mlx_sdpa_2pass_1", HEADERS, INPUTS, ("out", "sums", "maxs"), STRIDES + call, constants)


def second_pass() -> MetalKernel:
    call = (
        f"sdpa_vector_2pass_2<T, {SIZE}>(partials, sums, maxs, out, dims[0], {PLACE}, "
        "simdgroup_index_in_threadgroup, thread_index_in_simdgroup);"
    )
    return mlx_kernel("mlx_sdpa_2pass_2", HEADERS, ("partials", "sums", "maxs", "dims"), ("out",), call)


def normal(*shape: int) -> mx.array:
    return mx.array(RNG.normal(size=shape).astype(np.float32))


class Problem:
    """One call of attention, its reference, and the inputs of MLX's kernels."""

    def __init__(self, kind: str, dtype: mx.Dtype, rows: int) -> None:
        self.rows, self.dtype = rows, dtype
        q = normal(1, QUERY_HEADS, rows, SIZE).astype(dtype)
        k, v = (normal(1, KEY_HEADS, KEYS, SIZE).astype(dtype) for _ in range(2))
        bool_mask = mx.array(RNG.random((1, QUERY_HEADS, rows, KEYS)) < 0.7)
        float_mask = normal(1, QUERY_HEADS, rows, KEYS).astype(dtype)
        masks = {"none": None, "causal": "causal", "bool": bool_mask, "float": float_mask.astype(mx.float32)}
        self.want = mx.fast.scaled_dot_product_attention(
            *(x.astype(mx.float32) for x in (q, k, v)), scale=SCALE, mask=masks[kind]
        )
        dims = [QUERY_HEADS // KEY_HEADS, KEYS, KEYS, rows * KEYS, 1, QUERY_HEADS]
        strides = mx.array([KEYS * SIZE, SIZE], dtype=mx.uint64)
        self.inputs = [
            q,
            k,
            v,
            mx.array(dims, dtype=mx.int32),
            strides,
            mx.array([SCALE]),
            bool_mask,
            float_mask,
        ]

    def whole_heads(self) -> dict:
        """The launch of a kernel with one threadgroup per query head and row."""
        return {
            "template": [("T", self.dtype)],
            "grid": (QUERY_HEADS * 1024, self.rows, 1),
            "threadgroup": (1024, 1, 1),
            "output_shapes": [self.want.shape],
            "output_dtypes": [self.dtype],
        }

    def assert_right(self, got: mx.array) -> None:
        assert mx.abs(got.astype(mx.float32) - self.want).max() < BOUNDS[self.dtype]


@pytest.mark.parametrize("rows", [1, 5])
@pytest.mark.parametrize("kind,dtype", CASES, ids=str)
def test_sdpa_vector(kind: str, dtype: mx.Dtype, rows: int) -> None:
    problem = Problem(kind, dtype, rows)
    problem.assert_right(one_pass(kind)(inputs=problem.inputs, **problem.whole_heads())[0])


@pytest.mark.parametrize("rows", [1, 5])
@pytest.mark.parametrize("kind,dtype", CASES, ids=str)
def test_sdpa_vector_in_two_passes(kind: str, dtype: mx.Dtype, rows: int) -> None:
    problem = Problem(kind, dtype, rows)
    per_row = (1, QUERY_HEADS, rows, BLOCKS)
    partials = first_pass(kind)(
        inputs=problem.inputs,
        template=[("T", dtype)],
        grid=(KEY_HEADS * 32, QUERY_HEADS // KEY_HEADS, BLOCKS * rows),
        threadgroup=(32, QUERY_HEADS // KEY_HEADS, rows),
        output_shapes=[(*per_row, SIZE), per_row, per_row],
        output_dtypes=[dtype, mx.float32, mx.float32],
    )
    blocks = mx.array([BLOCKS], dtype=mx.int32)
    problem.assert_right(second_pass()(inputs=[*partials, blocks], **problem.whole_heads())[0])
