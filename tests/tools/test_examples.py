"""Three whole kernels agree with references in all dtypes, and their memory traffic is what their texts say."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from tests.metal_kernels import emulated
from tests.tools import examples

DTYPES = pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16], ids=["f32", "f16", "bf16"])
RNG = np.random.default_rng(1)


def as_float(array: mx.array) -> mx.array:
    return array.astype(mx.float32)


def normal(*shape: int) -> mx.array:
    return mx.array(RNG.normal(size=shape).astype(np.float32))


@DTYPES
def test_argmax_reads_every_logit_once(dtype: mx.Dtype) -> None:
    logits = normal(4, 49152).astype(dtype)
    launch = examples.argmax_rows(logits)
    assert mx.array_equal(emulated.run(launch)[0], mx.argmax(logits, axis=-1))
    traffic = emulated.traffic(launch)
    assert traffic["read"]["logits"] == logits.nbytes
    assert traffic["written"]["out"] == 4 * 4
    assert traffic["threadgroups"] == traffic["barriers"] == 4
    assert traffic["simd_ops"] == 4 * (32 + 1) * 2
    assert traffic["threadgroup_bytes"] == 32 * (4 + 4)


@pytest.mark.parametrize("threads", [32, 96, 1024])
def test_argmax_takes_the_first_of_equal_values(threads: int) -> None:
    logits = mx.zeros((2, 5000))
    logits[1, 700] = logits[1, 4100] = 1
    assert emulated.run(examples.argmax_rows(logits, threads))[0].tolist() == [0, 700]


@DTYPES
def test_reject_sample_follows_the_two_distributions(dtype: mx.Dtype) -> None:
    rows, vocabulary = 6, 12288
    target, draft = ((normal(rows, vocabulary) * 2).astype(dtype) for _ in range(2))
    tokens = np.array(mx.argmax(draft, axis=-1)).astype(np.uint32)
    uniforms = RNG.random((rows, 2)).astype(np.float32)
    uniforms[0, 0] = 0.0  # accepts
    launch = examples.reject_sample(target, draft, mx.array(tokens), mx.array(uniforms))
    accepted, following = (np.array(output) for output in emulated.run(launch))

    p, q = (np.array(mx.softmax(as_float(x), axis=-1)).astype(np.float64) for x in (target, draft))
    row = np.arange(rows)
    want = uniforms[:, 0] * q[row, tokens] < p[row, tokens]
    assert np.array_equal(accepted, want)
    assert want.any() and not want.all()
    assert np.array_equal(following[want], tokens[want])
    residual = np.cumsum(np.maximum(p - q, 0), axis=-1)
    residual /= residual[:, -1:]
    for i in row[~want]:
        pick = int(following[i])
        assert p[i, pick] > q[i, pick]
        assert residual[i, pick - 1] - 1e-5 <= uniforms[i, 1] <= residual[i, pick] + 1e-5


@pytest.mark.parametrize(
    "dtype,rows,depth,columns,bound",
    [(mx.float32, 8, 1024, 256, 1e-5), (mx.float16, 3, 512, 250, 1e-3), (mx.bfloat16, 16, 512, 64, 8e-3)],
    ids=["f32", "f16", "bf16"],
)
def test_qmm4_reads_every_weight_once(
    dtype: mx.Dtype, rows: int, depth: int, columns: int, bound: float
) -> None:
    x = normal(rows, depth).astype(dtype)
    w, scales, biases = mx.quantize((normal(columns, depth) * 0.05).astype(dtype), group_size=64, bits=4)
    launch = examples.qmm4_small(x, w, scales, biases)
    got = as_float(emulated.run(launch)[0])
    # in float32: MLX's CPU path accumulates in the type of x
    want = mx.quantized_matmul(
        as_float(x), w, as_float(scales), as_float(biases), transpose=True, group_size=64, bits=4
    )
    assert mx.abs(got - want).max() < bound * mx.abs(want).max()
    assert mx.array_equal(as_float(emulated.run(launch, mode="fast")[0]), got)
    emulated.run(launch)
    assert emulated.traffic(launch)["read"]["w"] == w.nbytes
