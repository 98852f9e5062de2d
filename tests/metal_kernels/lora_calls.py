"""Calls of gated_lora for its tests: random arguments, the float64 answer, and ways to execute them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np

from mtp_mlx.metal_kernels import gated_lora as lora
from mtp_mlx.metal_kernels.launch import Launch
from tests.metal_kernels import emulated

F32, F16, BF16 = mx.float32, mx.float16, mx.bfloat16
Execute = Callable[[Launch], list[mx.array]]
# Rounding of the result and of nothing else: half a unit in the last place, and float32 sums.
BOUND = {F32: 2e-6, F16: 2**-11 + 2e-6, BF16: 2**-8 + 2e-6}


class Case(NamedTuple):
    """Shapes of one call."""

    dtype: mx.Dtype
    slots: int
    n_real: int
    inputs: int
    outputs: int
    rank: int

    def __str__(self) -> str:
        dtype = str(self.dtype).rsplit(".", 1)[-1]
        return f"{dtype}-{self.slots}after{self.n_real}-{self.inputs}x{self.outputs}-rank{self.rank}"


def call(case: Case) -> tuple[Any, ...]:
    """Random arguments. The rows before the slot rows are NaN: they must never influence anything."""
    rng = np.random.default_rng(case.slots * 1000 + case.rank)
    x = rng.normal(size=(case.n_real + case.slots, case.inputs))
    y = rng.normal(size=(case.n_real + case.slots, case.outputs))
    x[: case.n_real] = y[: case.n_real] = np.nan
    down = rng.normal(size=(case.inputs, case.rank)) * case.inputs**-0.5
    up = rng.normal(size=(case.rank, case.outputs)) * case.rank**-0.5
    return *(mx.array(a).astype(case.dtype) for a in (x, y, down, up)), case.n_real, 0.75


def answer(x: mx.array, y: mx.array, down: mx.array, up: mx.array, n_real: int, scale: float) -> np.ndarray:
    """The contract in float64."""
    x64, y64, down64, up64 = (np.array(a.astype(F32)).astype(np.float64) for a in (x, y, down, up))
    return y64[n_real:] + scale * (x64[n_real:] @ down64) @ up64


def distance(result: mx.array, wanted: np.ndarray) -> float:
    """Largest difference, as a part of the largest value; NaN counts as infinite."""
    off = np.abs(np.array(result.astype(F32)).astype(np.float64) - wanted).max() / np.abs(wanted).max()
    return float("inf") if np.isnan(off) else float(off)


def once(arguments: tuple[Any, ...], execute: Execute = emulated.run) -> mx.array:
    """In one launch."""
    return execute(lora.launch(*arguments))[0]


def twice(arguments: tuple[Any, ...], execute: Execute = emulated.run) -> mx.array:
    """In two launches."""
    _, y, _, up, n_real, scale = arguments
    (hidden,) = execute(lora.launch_down(*arguments))
    return execute(lora.launch_up(hidden, y, up, n_real, scale))[0]


def executions() -> list[Execute]:
    """Ways to execute a launch: emulated under three schedules, or on the GPU where there is one."""
    return [
        lambda launch, schedule=schedule: emulated.run(launch, schedule) for schedule in emulated.SCHEDULES
    ]
