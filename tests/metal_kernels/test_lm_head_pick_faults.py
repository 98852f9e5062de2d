"""Planted faults in lm_head_pick: each breaks a rule of Metal, or computes or moves something else."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import mlx.core as mx
import mslemu
import numpy as np
import pytest

from mtp_mlx.metal_kernels import lm_head_pick
from tests.metal_kernels import emulated
from tests.metal_kernels.head_calls import assert_right, case

Edit = Callable[[str], str]


def swap(old: str, new: str, index: int = 0) -> Edit:
    """Replaces one occurrence of `old`."""

    def edit(text: str) -> str:
        parts = text.split(old)
        if len(parts) <= index + 1:
            return text
        return old.join(parts[: index + 1]) + new + old.join(parts[index + 1 :])

    return edit


BARRIER = "threadgroup_barrier(mem_flags::mem_threadgroup);"
PARTS_MUTANTS = {
    "dropped barrier": swap(BARRIER, ""),
    "dropped barrier between tiles": swap(BARRIER, "", 1),
    "wrong mem_flags": swap("mem_flags::mem_threadgroup", "mem_flags::mem_device"),
    "weights behind the last column": swap("k < size && first + c < columns", "k < size"),
    "weights behind the end of a row": swap("k < size && first + c < columns", "first + c < columns"),
    "hidden behind the end of a row": swap("if (k < size) {", "if (true) {"),
    "scale of the wrong lane": swap("0.0f, ushort(lane - k_lane % SHARE)", "0.0f, ushort(lane)"),
    "bias of the wrong lane": swap("0.0f, ushort(lane - k_lane % SHARE)", "0.0f, ushort(lane)", 1),
    "scales loaded by every lane": swap("live && k_lane % SHARE == 0", "live"),
    "wrong stride of the scales": swap("row * (size / (SHARE * VALUES))", "row * (size / VALUES)"),
    "scale and bias swapped": swap("scale[c], bias[c])", "bias[c], scale[c])"),
    "values of a word reversed": swap("at % PER_WORD)", "(PER_WORD - 1 - at % PER_WORD))"),
    "mask one bit short": swap("((1u << BITS) - 1u)", "((1u << BITS) - 2u)"),
    "wrong row of hidden": swap("min(m, rows - 1)", "0u"),
    "row behind the last": swap("min(m, rows - 1)", "m"),
    "rows and values of hidden swapped": swap("hidden + row * size + k", "hidden + k * rows + row"),
    "a share of the values left out": swap("s < SPLITS; s++", "s < SPLITS - 1; s++"),
    "lanes left out": swap("step < K_LANES", "step < K_LANES / 2"),
    "partial sums of rows overlap": swap("(split * ROWS + m) * TILE + l", "(split + m) * TILE + l"),
    "rows that do not exist are written": swap("row < rows && column", "column"),
    "columns that do not exist take part": swap("row < rows && column < columns", "row < rows"),
    "tiles overlap": swap("(part * n_tiles + turn)", "(part + turn)"),
    "last tile left out": swap("turn < n_tiles", "turn < n_tiles - 1"),
    "sums of the tile before": swap("sums[c][m] = 0.0f;", "sums[c][m] = turn == 0 ? 0.0f : 1.0f;"),
    "state not initialised": swap("states[slot] = no_pick(columns);", ""),
    "wrong identity of the best": swap("state.best = -INFINITY", "state.best = 0.0f"),
    "highest column of equals": swap("b.column < a.column", "b.column > a.column"),
    "mass not rescaled": swap("a.mass * mass_of(a.top, state.top)", "a.mass"),
    "probability with noise": swap("here.top = here.plain", "here.top = here.best"),
    "noise by column": swap("uint(token_ids[column]) : column", "column : column"),
    "noise of another row": swap("keys[2 * row]", "keys[0]"),
    "noise of the wrong sign": swap("here.plain + gumbel", "here.plain - gumbel"),
    "temperature forgotten": swap("logit * scale_of_logits", "logit"),
    "columns of a row left out": swap("step < TILE", "step < TILE / 2"),
    "fields of the parts swapped": swap("part_values[2 * field", "part_values[field"),
}  # fmt: skip
MERGE_MUTANTS = {
    "dropped barrier": swap(BARRIER, ""),
    "wrong mem_flags": swap("mem_flags::mem_threadgroup", "mem_flags::mem_none"),
    "parts left out": swap("part += threads_per_threadgroup.x", "part += 2 * threads_per_threadgroup.x"),
    "part behind the last": swap("part < parts", "part <= parts"),
    "wrong row": swap("at = row * parts", "at = (row ^ 1) * parts"),
    "slots nobody wrote": swap("lane < simdgroups_per_threadgroup", "lane < 32"),
    "only the first simdgroup": swap("lane < simdgroups_per_threadgroup", "lane < 1"),
    "lanes left out": swap("step < 32", "step < 16"),
    "fields swapped": swap("here.top = part_values[2 * field", "here.top = part_values[field"),
    "column instead of id": swap("token_ids[column] : int(column)", "int(column) : int(column)"),
    "probability with noise": swap("exp(state.plain", "exp(state.best"),
    "simdgroups share a slot": swap("group_columns[group]", "group_columns[0]"),
}
FAULT_COLUMNS = 1091


def fault_case(greedy: bool) -> lm_head_pick.Arguments:
    """Three rows for a kernel of four. Greedy: all logits negative, with ties."""
    arguments = case(3, FAULT_COLUMNS, 416, mx.float32, (32, 4), 0.0 if greedy else 0.7, True, seed=6)
    if not greedy:
        return arguments
    hidden, weight, scales, biases, *rest = arguments
    assert scales is not None and biases is not None
    biases = biases - 0.4
    twins = mx.array([4, 6, 20, 1000])  # equal columns near each other, in other tiles, in other parts
    for array in (weight, scales, biases):
        array[twins] = array[3]
    biases[mx.concatenate([mx.array([3]), twins])] += 0.2
    return mx.abs(hidden), weight, scales, biases, *rest


def outcome(greedy: bool, parts_edit: Edit | None, merge_edit: Edit | None) -> tuple[list, list]:
    """(picks and bytes of weights and scales; confidence) under each schedule."""
    arguments = fault_case(greedy)
    integers, probabilities = [], []
    for schedule in emulated.SCHEDULES:
        parts = lm_head_pick.launch_parts(*arguments)
        parts = parts if parts_edit is None else emulated.edited(parts, parts_edit)
        values, columns = emulated.run(parts, schedule)
        merge = lm_head_pick.launch_merge(values, columns, FAULT_COLUMNS, arguments[8])
        merge = merge if merge_edit is None else emulated.edited(merge, merge_edit)
        picks, confidence = emulated.run(merge, schedule)
        moved = emulated.traffic(parts)["read"]
        integers.append((picks.tolist(), moved["weight"], moved["scales"]))
        probabilities.append(confidence.tolist())
    return integers, probabilities


@lru_cache
def right_outcome(greedy: bool, enough_parts: int) -> tuple[list, list]:
    """The outcome without a fault; `enough_parts` names what the caller has set."""
    assert lm_head_pick.ENOUGH_PARTS == enough_parts
    integers, probabilities = outcome(greedy, None, None)
    for found, confidence in zip(integers, probabilities, strict=True):
        assert_right(fault_case(greedy), np.array(found[0]), np.array(confidence))
    return integers, probabilities


def is_seen(parts_edit: Edit | None, merge_edit: Edit | None, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether a fault breaks a rule of Metal or changes a result, in one of three cases."""
    for greedy, enough_parts in ((False, 1024), (False, 8), (True, 1024)):
        monkeypatch.setattr(lm_head_pick, "ENOUGH_PARTS", enough_parts)  # 8: several tiles per threadgroup
        monkeypatch.setattr(lm_head_pick, "MERGE_THREADS", 64)  # two simdgroups, several parts per thread
        right = right_outcome(greedy, enough_parts)
        try:
            wrong = outcome(greedy, parts_edit, merge_edit)
        except mslemu.KernelError:
            return True
        if wrong[0] != right[0] or not np.allclose(wrong[1], right[1], rtol=1e-4):
            return True
    return False


@pytest.mark.parametrize("name", PARTS_MUTANTS)
def test_planted_faults_of_the_first_launch_are_seen(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert is_seen(PARTS_MUTANTS[name], None, monkeypatch)


@pytest.mark.parametrize("name", MERGE_MUTANTS)
def test_planted_faults_of_the_second_launch_are_seen(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert is_seen(None, MERGE_MUTANTS[name], monkeypatch)
