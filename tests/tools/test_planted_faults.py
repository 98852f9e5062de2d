"""Faults planted in whole kernels are all reported, and nothing is reported in the kernels themselves."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import mlx.core as mx
import mslemu
import numpy as np
import pytest

from mtp_mlx.metal_kernels.launch import Launch
from tests.metal_kernels import emulated
from tests.tools import examples

VOCABULARY = 4096
BARRIER = "threadgroup_barrier(mem_flags::mem_threadgroup);"

Edit = Callable[[str], str]


def change(old: str, new: str = "", nth: int | None = None) -> Edit:
    """Replaces all of `old`, or its nth occurrence (from 0)."""

    def edit(text: str) -> str:
        if nth is None:
            return text.replace(old, new)
        parts = text.split(old)
        if len(parts) <= nth + 1:
            return text
        return old.join(parts[: nth + 1]) + new + old.join(parts[nth + 1 :])

    return edit


# ---------------------------------------------------------------------------------------------- three sound kernels

_rng = np.random.default_rng(0)
TARGET = (_rng.normal(size=(4, VOCABULARY)) * 2).astype(np.float32)
DRAFT = (TARGET + _rng.normal(size=(4, VOCABULARY)) * 2).astype(np.float32)
TOKENS = DRAFT.argmax(-1).astype(np.uint32)
REFUSED = np.tile(np.array([[0.999, 0.3]], np.float32), (4, 1))  # uniforms that accept no draft
WEIGHTS = [np.array(a) for a in mx.quantize(mx.array(_rng.normal(size=(64, 512)).astype(np.float32)), 64, 4)]


def argmax(threads: int = 1024) -> Launch:
    return examples.argmax_rows(mx.array(TARGET), threads)


def reject(uniforms: np.ndarray = REFUSED) -> Launch:
    return examples.reject_sample(*map(mx.array, (TARGET, DRAFT, TOKENS, uniforms)))


def qmm(columns: int = 64) -> Launch:
    x = mx.array(TARGET[:, :512])
    return examples.qmm4_small(x, *(mx.array(part[:columns]) for part in WEIGHTS))


@pytest.mark.parametrize(
    "sound", [argmax, reject, qmm, partial(qmm, 62)], ids=["argmax", "reject", "qmm", "qmm62"]
)
@pytest.mark.parametrize("schedule", [*emulated.SCHEDULES, ("random", 2), ("random", 3)], ids=str)
def test_sound_kernels_are_clean(sound: Callable[[], Launch], schedule: tuple[str, int]) -> None:
    emulated.run(sound(), schedule)


# ---------------------------------------------------------------------------------------------- faults in them


class Fault(NamedTuple):
    """An edit of a sound kernel.

    `seen` is a part of the message; None where no rule is broken, so that only a wrong result or more traffic can
    tell.
    """

    sound: Callable[[], Launch]
    edit: Edit
    seen: str | None


FAULTS = {
    "argmax: no barrier": Fault(argmax, change(BARRIER), "data race"),
    "argmax: barrier with mem_none": Fault(argmax, change("mem_threadgroup", "mem_none"), "data race"),
    "argmax: barrier with mem_device": Fault(argmax, change("mem_threadgroup", "mem_device"), "data race"),
    "argmax: simdgroup_barrier instead": Fault(
        argmax, change("threadgroup_barrier", "simdgroup_barrier"), "data race"
    ),
    "argmax: reads past the last row": Fault(
        argmax, change("i < uint(V); i +=", "i <= uint(V); i +="), "out of bounds"
    ),
    "argmax: wrong row": Fault(argmax, change("size_t(row) * V", "size_t(row) * V * 2"), "out of bounds"),
    "argmax: all rows write the first place": Fault(argmax, change("out[row]", "out[0]"), "data race"),
    "argmax: reads slots nobody wrote": Fault(
        partial(argmax, 512), change("live ? best_val[lane] : -INFINITY", "best_val[lane]"), "uninitialised"
    ),
    "argmax: barrier in one simdgroup": Fault(
        argmax, change(BARRIER, f"if (sg == 0) {{ {BARRIER} }}"), "divergence"
    ),
    "argmax: simd_max in divergent code": Fault(
        argmax,
        change("float m = simd_max(v);", "float m = v; if (lane < 16) { m = simd_max(v); }"),
        "divergence",
    ),
    "argmax: return before the barrier": Fault(
        argmax,
        change("  float m = simd_max(v);", "if (tid == 1000) return; float m = simd_max(v);"),
        "divergence",
    ),
    "reject: first barrier of tg_merge gone": Fault(
        reject, change(BARRIER, "", 0), "data race|uninitialised"
    ),
    "reject: second barrier of tg_merge gone": Fault(reject, change(BARRIER, "", 1), "data race"),
    "reject: barrier before the scan gone": Fault(
        reject, change(f"chosen = uint(V);\n  }}\n  {BARRIER}", "chosen = uint(V);\n  }"), "data race"
    ),
    "reject: last barrier gone": Fault(
        reject, change(f"chosen = pick;\n  }}\n  {BARRIER}", "chosen = pick;\n  }"), "data race"
    ),
    "reject: output left unwritten": Fault(
        partial(reject, REFUSED * 0),
        change("next[row] = t;\n    }\n    return", "}\n    return"),
        "never written",
    ),
    "qmm: no guard for the last columns": Fault(
        partial(qmm, 62), change("if (n < uint(N))", ""), "out of bounds"
    ),
    "qmm: weights read once more": Fault(
        qmm,
        change(
            "float xv[VPL];",
            "for (int r = 0; r < R; r++) { unpack8((w + size_t(n0 + r) * (K / 8))[k / 8], wv[r]); }\n float xv[VPL];",
        ),
        None,
    ),
    "qmm: writes to an input": Fault(
        qmm, change("y[size_t(m) * N", "((device T*)x)[0] = v; y[size_t(m) * N"), "write to input"
    ),
}


@pytest.mark.parametrize("name", FAULTS)
def test_fault_in_a_sound_kernel_is_reported(name: str) -> None:
    fault = FAULTS[name]
    planted = emulated.edited(fault.sound(), fault.edit)
    if fault.seen:
        with pytest.raises(mslemu.KernelError, match=fault.seen):
            emulated.run(planted)
        return
    emulated.run(fault.sound())
    emulated.run(planted)
    assert emulated.traffic(planted)["read"]["w"] > emulated.traffic(fault.sound())["read"]["w"]
