"""Every fault planted in block_attention's text is seen: a broken rule of Metal, a wrong result, or more traffic."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from mslemu import KernelError

from mtp_mlx.metal_kernels import block_attention as attention
from mtp_mlx.metal_kernels.launch import KernelText, Launch
from tests.metal_kernels import emulated
from tests.metal_kernels.attention_calls import BOUND, F16, Case, answer, attend, call, distance

BARRIER = "threadgroup_barrier(mem_flags::mem_threadgroup);"
DEVICE_BARRIER = "threadgroup_barrier(mem_flags::mem_device);"
SIMD_BARRIER = "simdgroup_barrier(mem_flags::mem_threadgroup);"
SEES = "visible[(first_row + mine + i) % R]"
STAGE_KEYS = "stage<T>(slab, STRIDE, keys, tile, TILE, end, column, WIDTH, me, threads);"
WEIGHT = "if (c < chunks) {\n      const float weight"

# what is wrong, the text, its replacement
PLAIN = [
    ("keys overwritten while read", BARRIER + "  // the slab may be overwritten, the queries", "// the queries"),
    ("keys read before they are there", BARRIER + "\n      add_scores", "add_scores"),
    ("values overwrite keys", BARRIER + "  // the slab may be overwritten, the weights", "// the weights"),
    ("values read before they are there", BARRIER + "\n      add_values", "add_values"),
    ("wrong mem_flags", BARRIER + "\n      add_scores", DEVICE_BARRIER + "\n      add_scores"),
    ("barrier of a simdgroup", BARRIER + "\n      add_values", SIMD_BARRIER + "\n      add_values"),
    ("one row past the end", "if (first + row < end)", "if (first + row <= end)"),
    ("unmasked tail of the cache", "const int end = min(begin + numbers[4], length);",
     "const int end = begin + numbers[4];"),
    ("unmasked tail of the tile", "key < end, (threadgroup", "true, (threadgroup"),
    ("prefix one too long", "key - own", "key - own - 1"),
    ("prefix one too short", "key - own", "key - own + 1"),
    ("another row's visibility", SEES, SEES.replace("+ i", "+ i + 1")),
    ("heads and rows swapped", SEES, SEES.replace("% R", "* R / packed % R")),
    ("keys in use as stride", "size_t(numbers[3])", "size_t(length)"),
    ("values of another head", "{values + cache}", "{values}"),
    ("queries of another head", "size_t(head) * packed * D", "size_t(head) * R * D"),
    ("values of the tile's start", "values, tile + from", "values, tile"),
    ("no initial values", "  clear(rows);\n", ""),
    ("wrong identity of the maximum", "LOWEST = -3.0e38f", "LOWEST = 0.0f"),
    ("no rescaling", "rows.mean[i][j] *= keep;", ""),
    ("one lane's sum", "simd_sum(rows.sum[i])", "rows.sum[i]"),
    ("one lane's maximum", "max(rows.top[i], simd_max(s))", "max(rows.top[i], s)"),
    ("stores one row too many", "if (first + i < packed)", "if (first + i <= packed)"),
    ("every lane stores", "if (lane == 0)", "if (true)"),
    ("keys read twice", STAGE_KEYS, STAGE_KEYS + " " + STAGE_KEYS),
]  # fmt: skip
Q8 = [
    ("bytes in the wrong order", "uint(8 * i)", "uint(24 - 8 * i)"),
    ("no bias", "* scale + bias", "* scale"),
    ("scales of the wrong group", "4 * at / G", "at / G"),
    ("words as stride of scales", "size_t(row) * (D / G)", "size_t(row) * (D / 4)"),
    ("keys' scales for values", "{values + words, value_scales", "{values + words, key_scales"),
    ("scales of another head", "cache * (D / G)", "cache * (D / 4)"),
    ("seven bits of a byte", "& 0xffu", "& 0x7fu"),
    ("words of the row before", "words + size_t(row)", "words + size_t(max(row - 1, 0))"),
]
MERGE = [
    ("no barrier", SIMD_BARRIER, ""),
    ("wrong mem_flags", SIMD_BARRIER, "simdgroup_barrier(mem_flags::mem_device);"),
    ("one chunk too many", WEIGHT, WEIGHT.replace("<", "<=")),
    ("first chunk left out", "for (int c = 0; c < chunks; c++)", "for (int c = 1; c < chunks; c++)"),
    ("wrong identity of the maximum", "float top = -3.0e38f", "float top = 0.0f"),
    ("one lane's maximum", "top = simd_max(top);", ""),
    ("one lane's sum", "simd_sum(mine)", "mine"),
    ("no initial value", "float mine = 0.0f;", "float mine;"),
    ("chunks and rows swapped", "partial[(size_t(c) * rows + row)", "partial[(size_t(row) * chunks + c)"),
    ("sums ignored", "+ 1] * fast::exp", "+ 1] * 0.0f + fast::exp"),
    ("half the columns", "d += 32", "d += 64"),
]
MUTANTS = [
    pytest.param(text, old, new, group, id=f"{text.name}: {label}")
    for text, mutants, group in (
        (attention.PLAIN, PLAIN, None),
        (attention.Q8, Q8, 64),
        (attention.MERGE, MERGE, None),
    )
    for label, old, new in mutants
]


def planted(text: KernelText, old: str, new: str) -> Callable[[Launch], Launch]:
    """A change of the launches that run `text`."""
    assert (text.header + text.body).count(old) == 1, "a fault is planted in one place"

    def edit(launch: Launch) -> Launch:
        if launch.text != text:
            return launch
        return emulated.edited(launch, lambda source: source.replace(old, new))

    return edit


@pytest.mark.parametrize("text,old,new,group", MUTANTS)
def test_a_planted_fault_is_seen(text: KernelText, old: str, new: str, group: int | None) -> None:
    """Two calls: ordinary scores, and scores far below zero, where a maximum that starts at zero shows."""
    edit = planted(text, old, new)
    for chill in (0.0, 150.0):
        arguments = call(Case(F16, 128, 4, 2, 13, 75, group=group), chill)
        sound = attention.launch_partial(*arguments, 64)
        emulated.run(sound)
        try:
            result = attend(arguments, 64, edit=edit)
        except KernelError as error:
            assert "failed" not in str(error), "the fault does not compile"
            return
        if distance(result, answer(*arguments)) > BOUND[F16]:
            return
        if emulated.traffic(edit(sound))["read"] != emulated.traffic(sound)["read"]:
            return
    pytest.fail("the fault went unnoticed")
