"""How the kernel tests execute a `Launch`: emulated under checks and three schedules, or by Metal where there is one.

What only the emulator can show (bytes moved, planted faults) is skipped on Metal with one of `EMULATION_ONLY`."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mslemu
import pytest

from mtp_mlx.metal_kernels.launch import KernelText, Launch

ON_METAL = mx.metal.is_available()
FACTORY = mx.fast.metal_kernel if ON_METAL else mslemu.metal_kernel
COUNTED = "bytes are counted under emulation only"
PLANTED = "faults are planted under emulation only: a GPU may hang on them"
EMULATION_ONLY = (COUNTED, PLANTED)
SCHEDULES = (("forward", 0), ("reverse", 0), ("random", 1))


def run(launch: Launch, schedule: tuple[str, int] = SCHEDULES[2], mode: str = "check") -> list[mx.array]:
    """The outputs of one launch; under emulation raises mslemu.KernelError where it breaks a rule of Metal."""
    order, seed = schedule
    with mslemu.options(mode=mode, order=order, seed=seed):
        return launch.run(FACTORY)


def traffic(launch: Launch) -> Any:
    """What the newest emulated launch of this text moved: bytes read and written by buffer, barriers, ..."""
    if ON_METAL:
        pytest.skip(COUNTED)
    return launch.kernel(mslemu.metal_kernel).last


def assert_text_is_mlx(launch: Launch) -> None:
    """The text the emulator ran is byte for byte what MLX itself would compile."""
    kernel, call = launch.kernel(mslemu.metal_kernel), launch.arguments()
    ours = mslemu.generated_source(kernel, call["inputs"], call["output_dtypes"], call["template"])
    assert ours == mslemu.mlx_generated_source(kernel, **call)


def edited(launch: Launch, edit: Callable[[str], str]) -> Launch:
    """The same launch of a text with a planted fault."""
    if ON_METAL:
        pytest.skip(PLANTED)
    text = launch.text
    changed = dataclasses.replace(text, header=edit(text.header), body=edit(text.body))
    assert changed != text, "the fault was not planted: its text is not in the kernel"
    return dataclasses.replace(launch, text=KernelText(**dataclasses.asdict(changed)))
