"""Planted faults in verify_tail: each breaks a rule of Metal, or computes or moves something else."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import mlx.core as mx
import mslemu
import numpy as np
import pytest

from mtp_mlx.metal_kernels import verify_tail
from mtp_mlx.metal_kernels.launch import Launch
from tests.metal_kernels import emulated
from tests.metal_kernels.verify_calls import (
    MODES,
    TEMPERATURE,
    assert_picks_are_right,
    case,
    leading_run,
    neck_and_neck,
    picks_and_accepted,
)

BARRIER = "threadgroup_barrier(mem_flags::mem_threadgroup);"


def nth(old: str, new: str, index: int = 0) -> Callable[[str], str]:
    """Replaces one occurrence of `old`."""

    def edit(text: str) -> str:
        parts = text.split(old)
        if len(parts) <= index + 1:
            return text
        return old.join(parts[: index + 1]) + new + old.join(parts[index + 1 :])

    return edit


MUTANTS = {
    # greedy and Gumbel
    "dropped barrier": ("greedy", nth(BARRIER, "")),
    "wrong mem_flags": ("greedy", nth("mem_flags::mem_threadgroup", "mem_flags::mem_device")),
    "bound off by one": ("greedy", nth("column < columns ?", "column <= columns ?")),
    "unmasked tail": ("greedy", nth("column < columns ?", "true ?")),
    "dropped tail": ("greedy", nth("start < columns; start +=", "start + 4 * threads <= columns; start +=")),
    "stride too long": ("greedy", nth("start += 4 * threads", "start += 5 * threads")),
    "logits read twice": ("greedy", nth("start += 4 * threads", "start += 2 * threads")),
    "wrong row": ("greedy", nth("base = row * columns", "base = (row ^ 1) * columns")),
    "wrong identity of the lead": ("greedy", nth("group_lead[lane] : 0u", "group_lead[lane] : 0xffffffffu")),
    "wrong identity of the best": ("greedy", nth("float best = -INFINITY", "float best = 0.0f")),
    "unwritten slots": ("greedy", nth("lane < groups ? group_lead[lane] : 0u", "group_lead[lane]")),
    "highest column of a tie in a thread": ("greedy", nth("!(score <= best)", "!(score < best)")),
    "highest column of a tie in a group": ("greedy", nth("simd_min(lead == top", "simd_max(lead == top")),
    "highest column of a tie between groups": ("greedy", nth("simd_min(lead == top", "simd_max(lead == top", 1)),
    "negative scores in the wrong order": ("greedy", nth("? ~bits", "? bits")),
    "draft of the wrong row": ("greedy", nth("tokens[row + 1] != token", "tokens[row] != token")),
    "a draft behind the last row": ("greedy", nth("row + 1 < rows", "row < rows")),
    "last mismatch instead of first": ("greedy", nth("atomic_fetch_min", "atomic_fetch_max")),
    "accepted overwritten": ("greedy", nth("atomic_fetch_min_explicit", "atomic_store_explicit")),
    "every thread writes": ("inverse cdf", nth("== writer) {\n    const", "!= threads) {\n    const")),
    "keys of another row": ("gumbel", nth("noise[2 * row]", "noise[row]")),
    "keys swapped": ("gumbel", nth("noise_bits(key_0, key_1", "noise_bits(key_1, key_0")),
    "noise by thread, not by token": ("gumbel", nth("key_1, column", "key_1, thread_index")),
    "temperature forgotten": ("gumbel", nth("score[k] * scale", "score[k]")),
    "noise of the wrong sign": ("gumbel", nth("scaled + gumbel", "scaled - gumbel")),
    "noise that could win is skipped": ("gumbel", nth("0.001f -", "-1.0f -")),
    "noise is skipped though it would beat the best": ("gumbel", nth("(w) < to_beat", "(w) < to_beat + 3.0f")),
    # inverse CDF
    "dropped first barrier": ("inverse cdf", nth(BARRIER, "", 1)),
    "dropped second barrier": ("inverse cdf", nth(BARRIER, "", 2)),
    "dropped third barrier": ("inverse cdf", nth(BARRIER, "", 3)),
    "range off by one": ("inverse cdf", nth("min((group + 1) * range, columns)", "(group + 1) * range")),
    "range without its tail": ("inverse cdf", nth("start < range_end; start", "start + 96 < range_end; start")),
    "forbidden tokens have mass": ("inverse cdf", nth("x[k] > -INFINITY ? mass_of(x[k], top, scale) : 0.0f", "1.0f")),
    "running sum not rescaled": ("inverse cdf", nth("mass *= mass_of(top, new_top, scale);", "")),
    "lanes not rescaled": ("inverse cdf", nth("simd_sum(mass * mass_of(top, simd_top, scale))", "simd_sum(mass)")),
    "ranges not rescaled": ("inverse cdf", nth("* mass_of(lane_top, row_top, scale)", "")),
    "total of the wrong lane": ("inverse cdf", nth("simd_shuffle(through, 31)", "simd_shuffle(through, 0)")),
    "goal not scaled": ("inverse cdf", nth("float(noise[row]) * total", "float(noise[row])")),
    "uniform of another row": ("inverse cdf", nth("noise[row]", "noise[0]")),
    "mass before the range forgotten": ("inverse cdf", nth("before_range + before_group", "before_group")),
    "mass before the group forgotten": ("inverse cdf", nth("before_range + before_group", "before_range")),
    "own group counted before itself": ("inverse cdf", nth("lane < group ?", "lane <= group ?")),
    "own mass counted before itself": ("inverse cdf", nth("(simd_through - mine)", "simd_through")),
    "group mass of the wrong lane": ("inverse cdf", nth("lane == 31", "lane == 30")),
    "stretch one short": ("inverse cdf", nth("+ threads - 1) / threads", ") / threads")),
    "walks to the end": ("inverse cdf", nth("if (sum > goal)", "if (false)")),
    "the whole row again": ("inverse cdf", nth("chosen_start = min(chosen * range, columns)", "chosen_start = 0u")),
}  # fmt: skip


FAULT_COLUMNS = (2503, 40_009)  # some simdgroups idle; several stretches of several columns


def fault_case(mode: str, n_columns: int) -> verify_tail.Arguments:
    """Six rows with ties and negative scores; the drafts of rows 1 and 3 are wrong."""
    logits, _, temperature, noise, _ = case(mode, 6, n_columns, mx.float32, seed=5)
    rows = np.array(logits)
    if mode == "greedy":
        rows = np.round(rows * 4)
        rows[0, [2100, 1024, 1041, 1045, 1024 + 640]] = 60.0  # ties within a thread, a simdgroup, and between
        rows[2] -= 100.0
    elif mode == "gumbel":
        rows *= 0.3  # the noise decides
        rows[2:] = neck_and_neck(noise, n_columns)[2:] * TEMPERATURE
    else:
        rows *= np.linspace(0.2, 1.2, n_columns)  # the running maximum rises and the ranges differ
    logits = mx.array(rows.astype(np.float32))
    picks, _ = verify_tail.reference(logits, mx.zeros((6,), dtype=mx.int32), temperature, noise)
    tokens = np.concatenate([[3], np.array(picks)[:-1]]).astype(np.int32)
    tokens[[2, 4]] += 1
    return logits, mx.array(tokens), temperature, noise, ()


TREE = (0, 0, 1, 1, 4, 5, 2)  # rows that eight rows' drafts follow, from row 1 on


def tree_case(right: Sequence[int]) -> verify_tail.Arguments:
    """Eight rows; the drafts of the rows `right` are the picks of the rows that they follow, the others are not."""
    logits = case("greedy", 8, FAULT_COLUMNS[0], mx.float32, seed=6)[0]
    picks = np.array(verify_tail.reference(logits, mx.zeros((8,), dtype=mx.int32), 0.0)[0])
    tokens = np.array([3, *(picks[parent] for parent in TREE)], dtype=np.int32)
    wrong = [row for row in range(1, 8) if row not in right]
    tokens[wrong] = [(tokens[row] + row) % FAULT_COLUMNS[0] for row in wrong]
    return logits, mx.array(tokens), 0.0, None, TREE


TREE_MUTANTS = {
    "a draft that follows another row": nth("uint(parents[child]) != row", "uint(parents[child]) != row + 1"),
    "right drafts count as wrong": nth("tokens[child] == token)", "tokens[child] != token)"),
    "the last draft is not compared": nth("child < rows; child++", "child + 1 < rows; child++"),
    "drafts behind a wrong one stay": nth("behind < rows; behind++", "behind == child; behind++"),
    "brothers of a wrong draft go too": nth("if (above == child)", "if (above >= uint(parents[child]))"),
    "one step up only": nth("while (above > child)", "if (above > child)"),
    "flags beside the picks": nth("&result[rows + behind]", "&result[behind]"),
    "flags of the wrong draft only": nth("result[rows + behind]", "result[rows + child]"),
    "the pending token counts as a draft": nth("child = row + 1", "child = row"),
}  # fmt: skip


@pytest.mark.parametrize("name", TREE_MUTANTS)
def test_planted_faults_in_the_walk_are_seen(name: str) -> None:
    cases = [tree_case(right) for right in ((1, 4, 6, 7), (2, 7, 5), (1, 2, 3, 4, 5, 6), (4, 5, 6, 7))]
    launches = [verify_tail.launch(*arguments) for arguments in cases]
    assert any(is_seen(launch, emulated.edited(launch, TREE_MUTANTS[name])) for launch in launches)


def outcome(launch: Launch) -> list[tuple[list[int], int]]:
    """Result and bytes of logits read, under each schedule."""
    found = []
    for schedule in emulated.SCHEDULES:
        result = emulated.run(launch, schedule)[0].tolist()
        found.append((result, emulated.traffic(launch)["read"]["logits"]))
    return found


def is_seen(right: Launch, wrong: Launch) -> bool:
    """Whether the faulty launch breaks a rule of Metal, or moves or computes anything else."""
    try:
        return outcome(wrong) != outcome(right)
    except mslemu.KernelError:
        return True


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("n_columns", FAULT_COLUMNS)
def test_without_a_fault_the_case_is_right(mode: str, n_columns: int) -> None:
    arguments = fault_case(mode, n_columns)
    picks, accepted = picks_and_accepted(arguments)
    assert_picks_are_right(arguments, picks)
    assert accepted == leading_run(picks, np.array(arguments[1])) == 1


@pytest.mark.parametrize("name", MUTANTS)
def test_planted_faults_are_seen(name: str) -> None:
    mode, edit = MUTANTS[name]
    launches = [verify_tail.launch(*fault_case(mode, n_columns)) for n_columns in FAULT_COLUMNS]
    assert any(is_seen(launch, emulated.edited(launch, edit)) for launch in launches)


@pytest.mark.parametrize("init_value", [None, 0])
def test_a_missing_start_value_is_seen(init_value: float | None) -> None:
    launch = verify_tail.launch(*fault_case("greedy", FAULT_COLUMNS[0]))
    assert is_seen(launch, dataclasses.replace(launch, init_value=init_value))
