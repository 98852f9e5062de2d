"""Metal's names of MLX's dtypes, the attributes of a thread, and the limits of a launch.

Sources: MLX's mlx/backend/common/metal_kernel.cpp (names, the order of attributes, which inputs are `constant`),
the Metal feature set tables (1024 threads and 32 KiB of threadgroup memory on every Apple GPU).
"""

from __future__ import annotations

from typing import NamedTuple

import mlx.core as mx
import numpy as np

SMALL_INPUT = 8  # inputs with fewer elements are passed in `constant` memory
MAX_THREADS = 1024  # of one threadgroup
MAX_THREADGROUP_BYTES = 32768
SIMD_WIDTH = 32

METAL_TYPE: dict[mx.Dtype, str] = {
    mx.bool_: "bool",
    mx.uint8: "uint8_t",
    mx.uint16: "uint16_t",
    mx.uint32: "uint32_t",
    mx.uint64: "uint64_t",
    mx.int8: "int8_t",
    mx.int16: "int16_t",
    mx.int32: "int32_t",
    mx.int64: "int64_t",
    mx.float16: "float16_t",
    mx.bfloat16: "bfloat16_t",
    mx.float32: "float",
    mx.complex64: "complex64_t",
}

# The type that holds a dtype's bytes on the host; numpy has no bfloat16.
HOST_TYPE: dict[mx.Dtype, type[np.generic]] = {
    mx.bool_: np.bool_,
    mx.uint8: np.uint8,
    mx.uint16: np.uint16,
    mx.uint32: np.uint32,
    mx.uint64: np.uint64,
    mx.int8: np.int8,
    mx.int16: np.int16,
    mx.int32: np.int32,
    mx.int64: np.int64,
    mx.float16: np.float16,
    mx.bfloat16: np.uint16,
    mx.float32: np.float32,
    mx.complex64: np.complex64,
}


class Attribute(NamedTuple):
    """A value available to every thread, such as its position in the grid."""

    name: str
    type: str
    value: str  # its expression in terms of `MslThread* t` (see unit.py)


ATTRIBUTES = (
    Attribute("dispatch_quadgroups_per_threadgroup", "uint", "t->quadgroups_per_threadgroup"),
    Attribute("dispatch_simdgroups_per_threadgroup", "uint", "t->dispatch_simdgroups_per_threadgroup"),
    Attribute("dispatch_threads_per_threadgroup", "uint3", "MSL_UINT3(t->dispatch_threads_per_threadgroup)"),
    Attribute("grid_origin", "uint3", "uint3(0)"),
    Attribute("grid_size", "uint3", "MSL_UINT3(t->threads_per_grid)"),
    Attribute("quadgroup_index_in_threadgroup", "uint", "t->quadgroup_index_in_threadgroup"),
    Attribute("quadgroups_per_threadgroup", "uint", "t->quadgroups_per_threadgroup"),
    Attribute("simdgroup_index_in_threadgroup", "uint", "t->simdgroup_index_in_threadgroup"),
    Attribute("simdgroups_per_threadgroup", "uint", "t->simdgroups_per_threadgroup"),
    Attribute("thread_execution_width", "uint", f"{SIMD_WIDTH}u"),
    Attribute("thread_index_in_quadgroup", "uint", "t->thread_index_in_quadgroup"),
    Attribute("thread_index_in_simdgroup", "uint", "t->thread_index_in_simdgroup"),
    Attribute("thread_index_in_threadgroup", "uint", "t->thread_index_in_threadgroup"),
    Attribute("thread_position_in_grid", "uint3", "MSL_UINT3(t->thread_position_in_grid)"),
    Attribute("thread_position_in_threadgroup", "uint3", "MSL_UINT3(t->thread_position_in_threadgroup)"),
    Attribute("threadgroup_position_in_grid", "uint3", "MSL_UINT3(t->threadgroup_position_in_grid)"),
    Attribute("threadgroups_per_grid", "uint3", "MSL_UINT3(t->threadgroups_per_grid)"),
    Attribute("threads_per_grid", "uint3", "MSL_UINT3(t->threads_per_grid)"),
    Attribute("threads_per_simdgroup", "uint", f"{SIMD_WIDTH}u"),
    Attribute("threads_per_threadgroup", "uint3", "MSL_UINT3(t->threads_per_threadgroup)"),
)
