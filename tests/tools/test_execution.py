"""Emulated kernels compute what Metal's words mean: positions, simd operations, vectors, rounding, atomics."""

from __future__ import annotations

import math
from collections.abc import Callable

import mlx.core as mx
import mslemu
import numpy as np
import pytest

from tests.metal_kernels import emulated
from tests.tools.examples import small_kernel

VALUES = np.random.default_rng(0).normal(size=64).astype(np.float32)


def result(*arguments, mode: str = "check", **settings) -> np.ndarray:
    """The output of `small_kernel`."""
    return np.array(emulated.run(small_kernel(*arguments, **settings), mode=mode)[0])


# ---------------------------------------------------------------------------------------------- threads


def test_positions_in_a_ragged_grid() -> None:
    grid, threadgroup = (5, 7, 3), (4, 2, 2)
    kernel = mslemu.metal_kernel(
        name="positions",
        input_names=["a"],
        output_names=["o"],
        source="""
          uint3 p = thread_position_in_grid;
          uint at = (p.x + 5 * (p.y + 7 * p.z)) * 6;
          uint3 g = threadgroup_position_in_grid, t = thread_position_in_threadgroup, n = threads_per_threadgroup;
          o[at] = g.x + 10 * g.y + 100 * g.z;
          o[at + 1] = t.x + 10 * t.y + 100 * t.z;
          o[at + 2] = thread_index_in_threadgroup;
          o[at + 3] = n.x + 10 * n.y + 100 * n.z;
          o[at + 4] = threads_per_grid.x + threadgroups_per_grid.y * 100;
          o[at + 5] = thread_index_in_simdgroup + a[0];""",
    )
    got = np.array(
        kernel(
            inputs=[mx.zeros((9,), mx.int32)],
            grid=grid,
            threadgroup=threadgroup,
            output_shapes=[(3, 7, 5, 6)],
            output_dtypes=[mx.int32],
        )[0]
    )
    decimal = np.array([1, 10, 100])
    for z, y, x in np.ndindex(3, 7, 5):
        position = np.array([x, y, z])
        group, inside = position // threadgroup, position % threadgroup
        size = np.minimum(threadgroup, np.array(grid) - group * threadgroup)
        index = inside[0] + size[0] * (inside[1] + size[1] * inside[2])
        want = [group @ decimal, inside @ decimal, index, size @ decimal, 5 + 400, index % 32]
        assert got[z, y, x].tolist() == want


# ---------------------------------------------------------------------------------------------- simd operations

LANES = np.arange(32)
SIMD_OPERATIONS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "simd_sum(v)": lambda v: np.full(32, v.sum()),
    "simd_max(v)": lambda v: np.full(32, v.max()),
    "simd_min(v)": lambda v: np.full(32, v.min()),
    "simd_product(v)": lambda v: np.full(32, v.prod()),
    "simd_prefix_inclusive_sum(v)": np.cumsum,
    "simd_prefix_exclusive_sum(v)": lambda v: np.cumsum(v) - v,
    "simd_prefix_inclusive_product(v)": np.cumprod,
    "simd_broadcast(v, 5)": lambda v: np.full(32, v[5]),
    "simd_broadcast_first(v)": lambda v: np.full(32, v[0]),
    "simd_shuffle(v, (l * 7 + 3) % 32)": lambda v: v[(LANES * 7 + 3) % 32],
    "simd_shuffle_xor(v, 5)": lambda v: v[LANES ^ 5],
    "simd_shuffle_up(v, 3)": lambda v: np.r_[v[:3], v[:-3]],
    "simd_shuffle_down(v, 3)": lambda v: np.r_[v[3:], v[-3:]],
    "simd_shuffle_rotate_up(v, 3)": lambda v: np.roll(v, 3),
    "simd_shuffle_rotate_down(v, 3)": lambda v: np.roll(v, -3),
    "simd_shuffle_and_fill_up(v, T(v * 2), 3)": lambda v: np.r_[2 * v[-3:], v[:-3]],
    "simd_shuffle_and_fill_down(v, T(v * 2), 3)": lambda v: np.r_[v[3:], 2 * v[:3]],
    "float(simd_all(v < 9))": lambda v: np.ones(32),
    "float(simd_any(v > 9))": lambda v: np.zeros(32),
    "float(simd_is_first())": lambda v: (LANES == 0).astype(np.float32),
    "float(popcount(uint(simd_vote::vote_t(simd_ballot(v > 0)))))": lambda v: np.full(32, (v > 0).sum()),
    "float(simd_and(uint(v * 100)) | simd_or(l) | simd_xor(l))": lambda v: np.full(32, 31.0),
    "quad_sum(v)": lambda v: np.repeat(v.reshape(8, 4).sum(1), 4),
    "quad_max(v)": lambda v: np.repeat(v.reshape(8, 4).max(1), 4),
    "quad_broadcast(v, 2)": lambda v: np.repeat(v.reshape(8, 4)[:, 2], 4),
    "quad_shuffle_xor(v, 1)": lambda v: v[LANES ^ 1],
}


@pytest.mark.parametrize("mode", ["check", "fast"])
@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16], ids=["f32", "bf16"])
def test_simd_operations(mode: str, dtype: mx.Dtype) -> None:
    """bfloat takes another way: through the overloads of MLX's bf16_math.h, which has none for quadgroups."""
    names = [name for name in SIMD_OPERATIONS if dtype == mx.float32 or "quad" not in name]
    stores = "".join(f"o[{row} * 64 + i] = float({name});\n" for row, name in enumerate(names))
    data = mx.array(VALUES).astype(dtype)
    got = result(
        "uint l = thread_index_in_simdgroup; T v = a[i];\n" + stores,
        data,
        threadgroup=64,
        shape=(len(names), 64),
        template=(("T", dtype),),
        mode=mode,
    )
    values = np.array(data.astype(mx.float32))
    bound = 1e-5 if dtype == mx.float32 else 2e-2
    for row, name in zip(got, names):
        want = np.r_[SIMD_OPERATIONS[name](values[:32]), SIMD_OPERATIONS[name](values[32:])]
        assert np.allclose(row, want, rtol=bound, atol=bound), name


def test_a_simdgroup_cut_by_the_grid_sums_the_lanes_it_has() -> None:
    got = result("o[i] = simd_sum(a[i]);", mx.array(VALUES[:40]), threadgroup=64)
    assert np.allclose(got[:32], VALUES[:32].sum(), atol=1e-5)
    assert np.allclose(got[32:], VALUES[32:40].sum(), atol=1e-5)


def test_simdgroup_matrix_multiplies() -> None:
    body = """
      simdgroup_float8x8 left, right, sum(0.0);
      simdgroup_load(left, a, 8); simdgroup_load(right, a + 64, 8, ulong2(0, 0), true);
      simdgroup_multiply_accumulate(sum, left, right, sum);
      simdgroup_store(sum, o, 8);"""
    data = np.random.default_rng(1).normal(size=(2, 8, 8)).astype(np.float32)
    got = result(body, mx.array(data.reshape(-1)), threads=32, shape=(8, 8))
    assert np.allclose(got, data[0] @ data[1].T, atol=1e-5)


# ---------------------------------------------------------------------------------------------- atomics


def test_atomic_counts_start_from_init_value() -> None:
    data = mx.random.randint(0, 1000, (1024,), dtype=mx.uint32)
    body = "atomic_fetch_add_explicit(&o[a[i] % 5], 1u, memory_order_relaxed);"
    got = result(
        body, data, threadgroup=256, shape=(5,), output=mx.uint32, atomic=True, init_value=3, name="histogram"
    )
    assert np.array_equal(got, np.bincount(np.array(data) % 5, minlength=5) + 3)


@pytest.mark.parametrize("dtype,start", [(mx.int32, 40), (mx.uint32, 40)], ids=["int", "uint"])
def test_atomic_minimum_maximum_store_and_exchange(dtype: mx.Dtype, start: int) -> None:
    kind = "int" if dtype == mx.int32 else "uint"
    body = f"""
      atomic_fetch_min_explicit(&o[0], a[i], memory_order_relaxed);
      atomic_fetch_max_explicit(&o[1], a[i], memory_order_relaxed);
      if (i == 0) {{ atomic_store_explicit(&o[2], {kind}(7), memory_order_relaxed); }}
      if (i == 1) {{ atomic_exchange_explicit(&o[3], {kind}(9), memory_order_relaxed); }}
      if (i == 2) {{ atomic_fetch_add_explicit(&o[4], atomic_load_explicit(&o[5], memory_order_relaxed),
                                               memory_order_relaxed); }}"""
    data = mx.arange(17, 81).astype(dtype)
    launch = small_kernel(body, data, shape=(6,), output=dtype, atomic=True, init_value=start)
    assert emulated.run(launch)[0].tolist() == [17, 80, 7, 9, 80, 40]
    emulated.assert_text_is_mlx(launch)


# ---------------------------------------------------------------------------------------------- numbers


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16], ids=["f16", "bf16"])
def test_half_rounds_after_every_operation(dtype: mx.Dtype) -> None:
    data = mx.array(VALUES).astype(dtype)
    got = result("T v = a[i]; o[i] = float(v * v * v + v);", data, template=(("T", dtype),))
    assert np.array_equal(got, np.array((data * data * data + data).astype(mx.float32)))


def test_unsuffixed_literals_are_float() -> None:
    got = result("o[i] = a[i] * 0.1 + 1e-8;", mx.array(VALUES), template=(("T", mx.float32),))
    assert np.array_equal(got, VALUES * np.float32(0.1) + np.float32(1e-8))


def test_log1p_and_erf_of_mlx() -> None:
    positive = np.abs(VALUES)
    got = result(
        "o[i] = log1p(a[i]); o[64 + i] = erf(a[i]);",
        mx.array(positive),
        shape=(2, 64),
        header='#include "mlx/backend/metal/kernels/erf.h"\n',
    )
    assert np.allclose(got[0], np.log1p(positive), rtol=1e-6)
    assert np.allclose(got[1], [math.erf(value) for value in positive], rtol=1e-6)


def test_integer_functions() -> None:
    data = np.random.default_rng(2).integers(1, 2**32, 64, dtype=np.uint32)
    wide = data.astype(np.uint64)
    wants = {
        "mulhi(v, 0xD2511F53u)": (wide * 0xD2511F53) >> 32,
        "rotate(v, 13u)": (wide << 13 | wide >> 19) & 0xFFFFFFFF,
        "popcount(v)": [int(v).bit_count() for v in data],
        "clz(v)": [32 - int(v).bit_length() for v in data],
        "ctz(v)": [(int(v) & -int(v)).bit_length() - 1 for v in data],
        "uint(ulong(v) * 0x9E3779B97F4A7C15ul >> 32)": (wide * np.uint64(0x9E3779B97F4A7C15)) >> 32,
        "as_type<uint>(as_type<int>(v) >> 3)": (data.view(np.int32) >> 3).view(np.uint32),
    }
    stores = "".join(f"o[{row} * 64 + i] = {name};\n" for row, name in enumerate(wants))
    got = result("uint v = a[i];\n" + stores, mx.array(data), shape=(len(wants), 64), output=mx.uint32)
    for row, (name, want) in zip(got, wants.items()):
        assert np.array_equal(row, np.asarray(want).astype(np.uint32)), name


# ---------------------------------------------------------------------------------------------- vectors


def test_float_vectors() -> None:
    body = """
      float4 v = *(const device float4*)(a + 4 * i);
      v = v.wzyx * 2.0 + float4(1, 2, 3, 4);
      o[i] = dot(v, float4(v.xy, 0, 1)) + max(v, float4(0)).z + as_type<float>(as_type<uint>(v.w));"""
    got = result(body, mx.array(VALUES), threads=16, threadgroup=16)
    v = VALUES.reshape(16, 4)[:, ::-1] * 2 + np.arange(1, 5, dtype=np.float32)
    want = v[:, 0] ** 2 + v[:, 1] ** 2 + v[:, 3] + np.maximum(v, 0)[:, 2] + v[:, 3]
    assert np.allclose(got, want, rtol=1e-5)


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16], ids=["half4", "bfloat4"])
def test_half_vectors(dtype: mx.Dtype) -> None:
    body = """
      vec<T, 4> v = *(const device vec<T, 4>*)(a + 4 * i);
      vec<T, 2> w = v.xy;
      o[i] = float(v.x) + 2.0 * float(v[3]) + float(w.y);"""
    data = mx.array(VALUES).astype(dtype)
    got = result(body, data, threads=16, threadgroup=16, template=(("T", dtype),))
    v = np.array(data.astype(mx.float32)).reshape(16, 4)
    assert np.allclose(got, v[:, 0] + 2 * v[:, 3] + v[:, 1], rtol=1e-6)


def test_wide_integer_loads_and_what_they_count() -> None:
    body = """
      uint4 w = ((const device uint4*)a)[i];
      uchar4 b = as_type<uchar4>(w.y);
      uchar4 c = ((const device uchar4*)a)[4 * i + 2];
      o[i] = w.x + b.z + 256u * c.w;"""
    data = np.random.default_rng(3).integers(0, 2**32, 64, dtype=np.uint32)
    launch = small_kernel(body, mx.array(data), threads=16, threadgroup=16, output=mx.uint32)
    rows, octets = data.reshape(16, 4), data.view(np.uint8).reshape(16, 4, 4)
    want = rows[:, 0] + octets[:, 1, 2] + 256 * octets[:, 2, 3].astype(np.uint32)
    assert np.array_equal(np.array(emulated.run(launch)[0]), want)
    traffic = emulated.traffic(launch)
    assert traffic["read"]["a"] == 16 * (16 + 4)
    assert traffic["loads"]["a"] == 32
    assert traffic["written"]["o"] == 64


# ---------------------------------------------------------------------------------------------- schedules


def test_an_undefined_order_shows_under_other_schedules() -> None:
    """Which thread is last is open in Metal, so a result that tells must change with the schedule."""
    body = "atomic_store_explicit(&o[0], i, memory_order_relaxed);"
    launch = small_kernel(body, mx.zeros((64,)), shape=(1,), output=mx.uint32, atomic=True, init_value=0)
    last = {schedule: emulated.run(launch, schedule)[0].item() for schedule in emulated.SCHEDULES}
    assert last["forward", 0] == 63
    assert last["reverse", 0] == 0


def test_options_are_restored_and_refuse_what_they_do_not_know() -> None:
    with pytest.raises(ValueError, match="mode is one of check, fast"), mslemu.options(mode="slow"):
        pass
    with pytest.raises(TypeError), mslemu.options(speed=1):
        pass
    with mslemu.options(mode="fast") as chosen:
        assert chosen.mode == "fast"
    with mslemu.options() as chosen:
        assert chosen == mslemu.Options()
