"""Every fault planted in gated_lora's text is seen: a broken rule of Metal, a wrong result, or more traffic."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import pytest
from mslemu import KernelError

from mtp_mlx.metal_kernels import gated_lora as lora
from mtp_mlx.metal_kernels.launch import KernelText, Launch
from tests.metal_kernels import emulated
from tests.metal_kernels.lora_calls import BOUND, F16, Case, answer, call, distance, once, twice

BARRIER = "threadgroup_barrier(mem_flags::mem_threadgroup);"
DEVICE_BARRIER = "threadgroup_barrier(mem_flags::mem_device);"
SIMD_BARRIER = "simdgroup_barrier(mem_flags::mem_threadgroup);"
READ_DOWN = "const float w = float(down[size_t(from + k) * rank + column]);"
# what is wrong, the text, its replacement; the header's faults are planted in the single launch
FUSED = [
    ("tile overwritten while read", BARRIER + "  // the tile may be overwritten", "// the tile may be overwritten"),
    ("tile read before it is there", BARRIER + "  // the tile is loaded", "// the tile is loaded"),
    ("wrong mem_flags", BARRIER + "  // the tile is loaded", DEVICE_BARRIER + "//"),
    ("scratch overwritten while read", BARRIER + "  // the scratch may be", "// the scratch may be"),
    ("scratch read before it is there", BARRIER + "  // the scratch is written", "// the scratch is written"),
    ("hidden read before it is there", BARRIER + "  // hidden is complete", SIMD_BARRIER + "//"),
    ("first real row for slot row", "x + size_t(n_real) * inputs", "x"),
    ("base of the wrong row", "y + size_t(n_real) * outputs", "y + size_t(n_real - 1) * outputs"),
    ("one input too many", "k < depth ? float(x", "k <= depth ? float(x"),
    ("unmasked tail of the inputs", "const int depth = min(DEPTH, end - from);", "const int depth = DEPTH;"),
    ("unmasked slot rows", "s < slots && k < depth ? float(x", "k < depth ? float(x"),
    ("down as [rank, inputs]", "down[size_t(from + k) * rank + column]", "down[size_t(column) * inputs + from + k]"),
    ("up as [outputs, rank]", "up[size_t(j) * outputs]", "up[j]"),
    ("no initial sums", "acc[s] = 0.0f;\n  }\n  for (int from = begin", "}\n  for (int from = begin"),
    ("wrong identity of the sum", "float sum = 0.0f;", "float sum = 1.0f;"),
    ("a share left out", "for (int p = 0; p < shares", "for (int p = 1; p < shares"),
    ("surplus threads join in", "share < shares ? share : depth", "share"),
    ("no scale", "scale * acc[s]", "acc[s]"),
    ("columns past the end", "min(begin + numbers[4], outputs)", "begin + numbers[4]"),
    ("writes real rows' places", "if (s < slots) {\n      const size_t", "if (s <= slots) {\n      const size_t"),
    ("down read twice", READ_DOWN, READ_DOWN + READ_DOWN.replace(" w ", " again ") + "acc[0] += 0.0f * again;"),
]  # fmt: skip
DOWN = [
    ("first real row for slot row", "x + size_t(n_real) * inputs", "x"),
    ("parts in one place", "size_t(part) * slots * rank + column", "column"),
    ("parts overlap", "begin + numbers[4], inputs", "begin + numbers[4] + 1, inputs"),
    ("inputs past the end", "min(begin + numbers[4], inputs)", "begin + numbers[4]"),
    ("columns past the rank", "min(64, rank - column)", "64"),
    ("all column tiles the first", "down + column, tile", "down, tile"),
    ("parts by SLOTS", "size_t(part) * slots * rank", "size_t(part) * SLOTS * rank"),
    (
        "part before",
        "const int begin = part * numbers[4];",
        "const int begin = max(part - 1, 0) * numbers[4];",
    ),
]
UP = [
    ("copy overwritten while read", BARRIER + "  // the copy may be", "// the copy may be"),
    ("copy read before it is there", BARRIER + "  // the copy is complete", "// the copy is complete"),
    ("wrong mem_flags", BARRIER + "  // the copy is complete", DEVICE_BARRIER + "//"),
    ("barrier of a simdgroup", BARRIER + "  // the copy may be overwritten", SIMD_BARRIER + "//"),
    ("last part left out", "p < numbers[4]", "p < numbers[4] - 1"),
    ("slots and parts swapped", "(size_t(p) * slots + s)", "(size_t(s) * numbers[4] + p)"),
    ("unmasked tail of the rank", "s < slots && j < depth", "s < slots && j <= depth"),
    ("unmasked slot rows", "s < slots && j < depth", "j < depth"),
    ("up from its first rank", "up + size_t(from) * outputs", "up"),
    (
        "column past the end",
        "if (column < outputs) {\n      add_up",
        "if (column <= outputs) {\n      add_up",
    ),
    (
        "no initial sums",
        "acc[s] = 0.0f;\n  }\n  for (int from = 0; from < rank",
        "}\n  for (int from = 0; from < rank",
    ),
    ("base of real rows", "y + size_t(n_real) * outputs", "y"),
]
MUTANTS = [
    pytest.param(text, old, new, id=f"{text.name}: {label}")
    for text, mutants in ((lora.FUSED, FUSED), (lora.DOWN, DOWN), (lora.UP, UP))
    for label, old, new in mutants
]


@pytest.mark.parametrize("text,old,new", MUTANTS)
def test_a_planted_fault_is_seen(text: KernelText, old: str, new: str) -> None:
    """By a broken rule of Metal, a wrong result, or more traffic."""
    assert (text.header + text.body).count(old) == 1, "a fault is planted in one place"
    arguments = call(Case(F16, 9, 2, 330, 601, 70))
    moved: dict[bool, Any] = {}

    def execute(launch: Launch, fault: bool) -> list[mx.array]:
        if launch.text == text:
            if fault:
                launch = emulated.edited(launch, lambda source: source.replace(old, new))
            outputs = emulated.run(launch)
            moved[fault] = emulated.traffic(launch)["read"]
            return outputs
        return emulated.run(launch)

    go = once if text is lora.FUSED else twice
    go(arguments, lambda launch: execute(launch, False))
    try:
        result = go(arguments, lambda launch: execute(launch, True))
    except KernelError as error:
        assert "failed" not in str(error), "the fault does not compile"
        return
    assert distance(result, answer(*arguments)) > BOUND[F16] or moved[True] != moved[False]
