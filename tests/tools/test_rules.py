"""Each rule of Metal by itself: what breaks it is reported, with the line, and what keeps it is not."""

from __future__ import annotations

from typing import Any, NamedTuple

import mlx.core as mx
import mslemu
import pytest

from tests.metal_kernels import emulated
from tests.tools.examples import small_kernel

RAMP = mx.arange(64).astype(mx.float32)
BARRIER = "threadgroup_barrier(mem_flags::mem_threadgroup);"
LANE = "uint l = i % 32;"


class Fault(NamedTuple):
    """A body that breaks a rule, a part of the message, and how `small_kernel` is called where RAMP does not do."""

    body: str
    seen: str
    call: dict[str, Any] = {}


FAULTS = {
    # memory
    "misaligned float4 load": Fault("o[i] = (*(const device float4*)(a + 1)).x;", "misaligned"),
    "float4 load at a multiple of 8 bytes": Fault("o[i] = (*(const device float4*)(a + 2)).x;", "misaligned"),
    "local array index": Fault(
        "float t[4]; for (int j = 0; j < 4; j++) t[j] = a[j]; o[i] = t[i & 7];", "out of bounds"
    ),
    "threadgroup array index": Fault(
        f"threadgroup float t[16]; t[i % 32] = a[i]; {BARRIER} o[i] = t[(i + 1) % 16];", "out of bounds"
    ),
    "grid 70, written for 96": Fault(
        "o[threadgroup_position_in_grid.x * 32 + 31 - thread_position_in_threadgroup.x] = a[i];",
        "out of bounds",
        {"data": mx.arange(70).astype(mx.float32)},
    ),
    "36 KiB of threadgroup memory": Fault(
        "threadgroup float t[9216]; t[i] = a[i]; o[i] = t[i];", "the limit is 32768"
    ),
    # races
    "reads a neighbour's output": Fault(
        "o[i] = a[i]; if (i + 1 < 64) { o[i] += o[i + 1]; }", "data race|uninitialised"
    ),
    "no simdgroup_barrier": Fault(
        f"threadgroup float t[32]; {LANE} t[l] = a[l]; o[i] = t[31 - l];",
        "data race|uninitialised",
        {"threads": 32},
    ),
    "simdgroup_barrier with mem_device": Fault(
        f"threadgroup float t[32]; {LANE} t[l] = a[l]; simdgroup_barrier(mem_flags::mem_device); o[i] = t[31 - l];",
        "data race",
        {"threads": 32},
    ),
    "counts without atomics": Fault("o[i] = 0; o[uint(a[i]) % 4] += 1;", "data race", {"output": mx.uint32}),
    "plain read of an atomic count": Fault(
        """atomic_fetch_add_explicit(&o[0], 1u, memory_order_relaxed);
           uint n = *(device uint*)&o[0];
           atomic_fetch_max_explicit(&o[0], n, memory_order_relaxed);""",
        "data race",
        {"output": mx.uint32, "atomic": True, "init_value": 0, "shape": (1,)},
    ),
    # simdgroups and undefined behaviour
    "shuffle from a lane that returned": Fault(
        "if ((i & 31) == 31) { o[i] = 0; return; } o[i] = simd_shuffle_down(a[i], 1);", "inactive lane"
    ),
    "shuffle from lane 40": Fault("o[i] = simd_shuffle(a[i], 40);", "lane index out of range"),
    "shift by 32": Fault("uint s = 32 - (i & 1); o[i] = float(1u << s);", "shift amount"),
    "signed overflow": Fault("int x = 2147483600 + int(a[i]); o[i] = x;", "signed integer overflow"),
    "division by zero": Fault("int z = int(a[i]) - int(i); o[i] = 7 / z;", "division by zero"),
    # the language
    "device pointer for a thread parameter": Fault(
        "o[i] = f(a);",
        "no matching function",
        {"header": "inline float f(thread const float* p) { return p[0]; }\n"},
    ),
    "device pointer to threadgroup memory": Fault(
        "threadgroup float t[4]; const device float* p = t; o[i] = p[0];", "cannot initialize"
    ),
    "writes to a constant input": Fault("a[0] = 1; o[i] = 0;", "read-only", {"data": mx.zeros((3,))}),
    "pointer without address space": Fault(
        "const float* p = a; o[i] = p[0];", "without an address space.*line 2"
    ),
    "float to bfloat implicitly": Fault("o[i] = a[i];", "bfloat implicitly", {"output": mx.bfloat16}),
    "max of float and int": Fault("o[i] = max(a[i], 0);", "ambiguous"),
    "double": Fault("double z = a[i]; o[i] = z;", "double"),
    "exp of an int": Fault("o[i] = exp(2);", "ambiguous"),
    "std:: name": Fault("o[i] = std::max(a[i], 0.0f);", "std"),
    "threadgroup variable with a value": Fault("threadgroup float t = 0; o[i] = t;", "initialiser"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_broken_rule_is_reported(name: str) -> None:
    fault = FAULTS[name]
    with pytest.raises(mslemu.KernelError, match=fault.seen):
        emulated.run(small_kernel(fault.body, **{"data": RAMP, **fault.call}))


def test_an_uninitialised_local_is_nan() -> None:
    launch = small_kernel("float s; if (a[i] > 100) s = 1; o[i] = s;", RAMP)
    assert mx.isnan(emulated.run(launch)[0]).any()


def test_more_than_1024_threads_are_refused() -> None:
    launch = small_kernel("o[i] = a[i];", mx.zeros((2048,)), threadgroup=2048)
    with pytest.raises(ValueError, match="greater than 1024"):
        emulated.run(launch)


def exchange(barrier: str) -> str:
    """Neighbours exchange values through threadgroup memory."""
    return f"threadgroup float t[32]; {LANE} t[l] = a[i]; {barrier} o[i] = t[31 - l];"


SOUND = {
    "write, barrier, read by others": exchange(BARRIER),
    "write, simdgroup_barrier, read by the simdgroup": exchange(
        BARRIER.replace("threadgroup_b", "simdgroup_b")
    ),
    "both memories named": exchange(
        "threadgroup_barrier(mem_flags::mem_device | mem_flags::mem_threadgroup);"
    ),
    "device memory, ordered by mem_device": """
      o[i] = a[i];
      threadgroup_barrier(mem_flags::mem_device);
      float x = o[i ^ 1];
      threadgroup_barrier(mem_flags::mem_device);
      o[i] = x;""",
    "all read the same, then one writes": f"""
      threadgroup float t;
      if (i % 32 == 0) {{ t = a[i]; }}
      {BARRIER}
      float x = t;
      {BARRIER}
      if (i % 32 == 1) {{ t = x + 1; }}
      {BARRIER}
      o[i] = t;""",
    "a branch the whole simdgroup takes": """
      float x = 0;
      if (simdgroup_index_in_threadgroup == 0) { x = simd_sum(a[i]); }
      o[i] = x;""",
    "private memory by pointer": """
      float t[2] = {a[i], 1.0};
      thread const float* p = t;
      o[i] = p[i & 1];""",
    "unsigned arithmetic wraps": "o[i] = float((i - 1u) >> 31);",
}


@pytest.mark.parametrize("name", SOUND)
def test_allowed_code_is_not_reported(name: str) -> None:
    for schedule in emulated.SCHEDULES:
        emulated.run(small_kernel(SOUND[name], RAMP), schedule)


def test_what_is_not_strict_lets_divergent_code_be() -> None:
    body = """
      float x = 0;
      if (i % 2 == 0) { x = simd_sum(a[i]); }
      o[i] = simd_max(x);"""
    launch = small_kernel(body, RAMP, threads=32, name="divergent")
    with pytest.raises(
        mslemu.KernelError, match=r"divergence: .* wait in simd_sum \(line 4\); .* simd_max \(line 5\)"
    ):
        emulated.run(launch, ("forward", 0))
    with mslemu.options(strict=False):
        assert emulated.run(launch)[0].tolist() == [sum(range(0, 32, 2))] * 32


def test_a_message_names_the_line() -> None:
    body = "float x = a[i];\n  if (i == 40) {\n    x += a[i + 24];\n  }\n  o[i] = x;"
    with pytest.raises(
        mslemu.KernelError, match=r"out of bounds: read of 4 bytes .*'a' \(256 bytes\)"
    ) as caught:
        emulated.run(small_kernel(body, RAMP, name="lines"))
    assert str(caught.value).endswith("at lines.metal:4")
    with pytest.raises(mslemu.KernelError, match=r"lines\.metal:3:.*undeclared"):
        emulated.run(small_kernel("o[i] = 0;\n  o[j] = 0;", RAMP, name="lines"))


def test_a_crash_of_the_kernel_is_a_message() -> None:
    trap = small_kernel("o[i] = a[i]; if (a[i] == 40) { __builtin_trap(); }", RAMP)
    with pytest.raises(mslemu.KernelError, match="the kernel crashed: trap"):
        emulated.run(trap, mode="fast")
    emulated.run(small_kernel("o[i] = a[i];", RAMP))  # and the next launch works


def test_traffic_is_kept_when_a_rule_was_broken() -> None:
    launch = small_kernel("o[i] = a[i]; if (i == 63) { o[i] = a[64]; }", RAMP, name="kept")
    with pytest.raises(mslemu.KernelError, match="out of bounds"):
        emulated.run(launch, ("forward", 0))
    traffic = emulated.traffic(launch)
    assert traffic["read"]["a"] == RAMP.nbytes
    assert traffic["threadgroups"] == 1
    with pytest.raises(KeyError):
        traffic["colour"]
