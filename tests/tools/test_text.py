"""The text the emulator runs is, byte for byte, the text MLX itself would compile."""

from __future__ import annotations

import mlx.core as mx
import pytest

from mtp_mlx.metal_kernels.launch import KernelText, Launch
from tests.metal_kernels import emulated
from tests.tools import examples


def launch(
    source: str,
    inputs: dict[str, mx.array],
    template: tuple = (),
    header: str = "",
    atomic: bool = False,
    init_value: float | None = None,
    dtype: mx.Dtype = mx.float32,
) -> Launch:
    return Launch(
        text=KernelText("k", tuple(inputs), ("o",), header, source, atomic_outputs=atomic),
        inputs=tuple(inputs.values()),
        template=template,
        grid=(4, 1, 1),
        threadgroup=(4, 1, 1),
        output_shapes=((4,),),
        output_dtypes=(dtype,),
        init_value=init_value,
    )


UPDATE = "atomic_fetch_min_explicit(&o[0], x[thread_index_in_threadgroup], memory_order_relaxed);"
LAUNCHES = {
    "shapes, strides, 0-d and small inputs, all kinds of template arguments": launch(
        "o[thread_position_in_grid.x] = a_shape[0] + a_strides[1] + a_ndim + b_shape[0] + c;",
        {"a": mx.zeros((4, 5)), "b": mx.zeros((3,)), "c": mx.array(1.0)},
        (("T", mx.bfloat16), ("N", 4), ("B", True)),
    ),
    "no template": launch(
        "o[simdgroup_index_in_threadgroup + threads_per_threadgroup.x] = a[0];",
        {"a": mx.zeros((8,), mx.uint8)},
    ),
    "a negative template argument, a header, an attribute's name inside another": launch(
        "uint grid_size_x = threadgroups_per_grid.x; o[grid_size_x] = x[0];",
        {"x": mx.zeros((9,), mx.int64), "y": mx.zeros((2, 2), mx.bool_)},
        (("K", -3),),
        "inline int f() { return 1; }\n",
    ),
    "atomic outputs": launch(UPDATE, {"x": mx.zeros((9,))}, atomic=True),
    "atomic unsigned outputs with a start value": launch(
        UPDATE, {"x": mx.zeros((9,), mx.uint32)}, atomic=True, init_value=7, dtype=mx.uint32
    ),
    "argmax_rows": examples.argmax_rows(mx.zeros((3, 96), mx.bfloat16)),
    "reject_sample": examples.reject_sample(
        mx.zeros((9, 96)), mx.zeros((9, 96)), mx.zeros((9,), mx.uint32), mx.zeros((9, 2))
    ),
    "reject_sample below the size of device inputs": examples.reject_sample(
        mx.zeros((2, 96)), mx.zeros((2, 96)), mx.zeros((2,), mx.uint32), mx.zeros((2, 2))
    ),
    "qmm4_small": examples.qmm4_small(
        mx.zeros((3, 512), mx.float16),
        mx.zeros((8, 64), mx.uint32),
        mx.zeros((8, 8), mx.float16),
        mx.zeros((8, 8), mx.float16),
    ),
}


@pytest.mark.parametrize("case", LAUNCHES)
def test_text_is_what_mlx_generates(case: str) -> None:
    emulated.assert_text_is_mlx(LAUNCHES[case])
