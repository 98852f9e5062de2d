"""Proves that the dispatcher runs a kernel only after its self-check and race, and remembers why not."""

from __future__ import annotations

import json
import logging
import sys
from pathlib import Path
from typing import Any

import mlx.core as mx
import mslemu
import pytest

from mtp_mlx.errors import MTPError
from mtp_mlx.metal_kernels import dispatch
from mtp_mlx.metal_kernels import race as race_module
from mtp_mlx.metal_kernels.dispatch import Dispatcher, find_factory, mode_from_environment
from mtp_mlx.metal_kernels.launch import Support
from tests.metal_kernels import emulated


class Doubling:
    """A kernel module that doubles a vector; what is wrong with it is up to the test."""

    def __init__(self, factor: float = 2.0, error: str = "") -> None:
        self.factor, self.error, self.runs = factor, error, 0

    def supported(self, x: mx.array) -> Support:
        return Support(x.ndim == 1, "one dimension only")

    def run(self, factory: Any, x: mx.array) -> mx.array:
        self.runs += 1
        if self.error:
            raise RuntimeError(self.error)
        return x * self.factor

    def reference(self, x: mx.array) -> mx.array:
        return x + x

    def agrees(self, ours: mx.array, theirs: mx.array) -> bool:
        return bool(mx.array_equal(ours, theirs).item())

    def shape_key(self, x: mx.array) -> str:
        return f"{x.dtype} {x.shape[0]}"

    def samples(self) -> list[tuple[Any, ...]]:
        return [(mx.arange(4.0),), (mx.zeros((2, 2)),)]


X = mx.array([1.0, 2.0, 3.0])


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> Doubling:
    module = Doubling()
    monkeypatch.setattr(dispatch, "kernel_module", lambda name: module)
    return module


def races(monkeypatch: pytest.MonkeyPatch, ratio: float) -> list[int]:
    """Fixes the outcome of races; the list grows by one per race."""
    held: list[int] = []

    def fixed(*_: Any) -> float:
        held.append(1)
        return ratio

    monkeypatch.setattr(dispatch, "race", fixed)
    return held


def dispatcher(mode: Any = "auto", file: Path | None = None) -> Dispatcher:
    return Dispatcher(mode, lambda **_: None, "Metal", file)


def test_a_kernel_that_agrees_and_wins_is_used(kernel: Doubling, monkeypatch: pytest.MonkeyPatch) -> None:
    held = races(monkeypatch, 0.5)
    ours = dispatcher()
    for _ in range(3):
        assert mx.array_equal(ours.attempt("doubling", X), X * 2)
    assert len(held) == 1, "one shape is raced once"
    assert ours.counts["doubling", "kernel"] == 3
    assert ours.verdicts["doubling mlx.core.float32 3"].time_ratio == 0.5


def test_a_kernel_that_loses_its_race_is_not_used(
    kernel: Doubling, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    races(monkeypatch, 0.99)
    ours = dispatcher()
    with caplog.at_level(logging.INFO, logger="mtp_mlx"):
        assert ours.attempt("doubling", X) is None
        assert ours.attempt("doubling", X) is None
    assert [record.levelno for record in caplog.records] == [logging.INFO], "no news for a terminal"
    assert ours.counts["doubling", "self-check passed, lost its race"] == 2


def test_a_wrong_result_keeps_the_kernel_out_even_when_forced(kernel: Doubling) -> None:
    kernel.factor = 2.001
    ours = dispatcher("force")
    assert ours.attempt("doubling", X) is None
    assert "differs" in ours.demoted["doubling"] and not ours.verdicts


def test_a_compile_error_demotes_once_for_every_shape(
    kernel: Doubling, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    kernel.error = "Unable to build metal library\nline 3: expected ';'"
    ours = dispatcher("auto", tmp_path / "kernels.json")
    for size in (3, 3, 4, 5):
        assert ours.attempt("doubling", mx.zeros((size,))) is None
    assert kernel.runs == 1, "a kernel that failed is not tried again"
    assert ours.report() == {"doubling: failed: Unable to build metal library": 4}
    assert ours.demoted == {"doubling": "failed: Unable to build metal library"}
    assert len(caplog.records) == 1, "told once"
    assert not (tmp_path / "kernels.json").exists(), "a failure may be today's, of full memory"


def test_a_race_that_fails_and_a_kernel_that_fails_later_reach_nobody(
    kernel: Doubling, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any) -> float:
        raise RuntimeError("[metal::malloc] out of memory")

    monkeypatch.setattr(dispatch, "race", broken)
    first = dispatcher()
    assert first.attempt("doubling", X) is None and "malloc" in first.demoted["doubling"]
    races(monkeypatch, 0.5)
    second = dispatcher()
    assert second.attempt("doubling", X) is not None
    kernel.error = "too many threads"
    assert second.attempt("doubling", X) is None and second.demoted["doubling"] == "too many threads"


def test_metal_kernels_rest_while_the_cpu_is_the_default_device(
    kernel: Doubling, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Launches of `mx.fast.metal_kernel` go to the GPU whatever the default device is."""
    ours = Dispatcher("force", mx.fast.metal_kernel, "Metal")
    monkeypatch.setattr(mx, "default_device", lambda: mx.Device(mx.cpu))
    assert ours.attempt("doubling", X) is None and kernel.runs == 0


def test_unsupported_calls_are_counted_with_their_reason(kernel: Doubling) -> None:
    ours = dispatcher("force")
    assert ours.attempt("doubling", X[None]) is None
    assert ours.counts["doubling", "one dimension only"] == 1
    assert kernel.runs == 0


def test_without_a_factory_nothing_is_judged(kernel: Doubling) -> None:
    ours = Dispatcher("auto", None, "no Metal on this machine")
    assert ours.attempt("doubling", X) is None
    assert not ours.active and not ours.counts


def test_verdicts_are_kept_on_disk_for_this_machine_only(
    kernel: Doubling, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    held = races(monkeypatch, 0.5)
    file = tmp_path / "kernels.json"
    dispatcher(file=file).attempt("doubling", X)
    dispatcher(file=file).attempt("doubling", X)
    assert len(held) == 1
    stored = json.loads(file.read_text())
    stored["machine"]["device"] = "another"
    file.write_text(json.dumps(stored))
    dispatcher(file=file).attempt("doubling", X)
    assert len(held) == 2


def test_processes_that_share_the_file_keep_each_others_verdicts(
    kernel: Doubling, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    held = races(monkeypatch, 0.5)
    file = tmp_path / "kernels.json"
    one, other = dispatcher(file=file), dispatcher(file=file)
    one.attempt("doubling", mx.zeros((4,)))
    other.attempt("doubling", mx.zeros((5,)))
    third = dispatcher(file=file)
    for size in (4, 5):
        third.attempt("doubling", mx.zeros((size,)))
    assert len(held) == 2
    third.verdicts.forget()
    assert not file.exists() and not dispatcher(file=file).verdicts


def test_a_damaged_file_is_said_and_judged_again(
    kernel: Doubling, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    races(monkeypatch, 0.5)
    file = tmp_path / "kernels.json"
    for text in ("{", '{"machine": 3}', "[]"):
        file.write_text(text)
        caplog.clear()
        assert dispatcher(file=file).attempt("doubling", X) is not None
        assert len(caplog.records) == (0 if text == '{"machine": 3}' else 1)


def test_samples_are_judged_for_doctor(kernel: Doubling, monkeypatch: pytest.MonkeyPatch) -> None:
    races(monkeypatch, 2.0)
    verdicts = dispatcher().judge_samples("doubling", raced=True)
    assert [v.uses_kernel for v in verdicts.values()] == [False, False]
    assert [v.reason for v in verdicts.values()] == ["self-check passed, lost its race", "one dimension only"]
    assert dispatcher("force").judge_samples("doubling", raced=False)["mlx.core.float32 4"].uses_kernel


def test_the_race_is_the_ratio_of_the_lanes_own_times(monkeypatch: pytest.MonkeyPatch) -> None:
    """By a clock that only the lanes move: ours costs 3 a call, stock MLX 4; and inputs take turns."""
    clock = [0.0]
    seen: set[float] = set()

    def lane(seconds: float) -> Any:
        def call(x: mx.array, rows: int) -> mx.array:
            clock[0] += seconds
            seen.add(x[0, 0].item())
            return x * rows

        return call

    monkeypatch.setattr(race_module.time, "perf_counter", lambda: clock[0])
    ratio = race_module.race(lane(3.0), lane(4.0), (mx.arange(8.0).reshape(4, 2), 2))
    assert ratio == 0.75
    assert len(seen) == race_module.COPIES


@pytest.mark.parametrize("name", ["gated_lora", "block_attention"])
def test_what_is_raced_is_the_same_computation(name: str) -> None:
    """Both lanes of the race, with the kernel and without, give the same result."""
    module = dispatch.kernel_module(name)
    for arguments in module.samples():
        with_kernel, without = module.in_place(emulated.FACTORY, arguments)  # type: ignore[attr-defined]
        ours, theirs = with_kernel(*arguments).astype(mx.float32), without(*arguments).astype(mx.float32)
        assert ours.shape == theirs.shape
        # MLX's CPU sums quantised products in 16 bits: a tenth is far below what a wrong row or mask does
        assert (mx.abs(ours - theirs).max() <= 0.1 * mx.abs(theirs).max()).item(), module.shape_key(
            *arguments
        )


def test_large_operands_are_not_copied() -> None:
    assert race_module._copies((mx.zeros((16, 16)),)) == race_module.COPIES
    assert race_module._copies((mx.zeros((1,)), mx.zeros((race_module.LARGEST_CACHE // 4,)), 3)) == 1


def test_the_environment_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MTP_MLX_KERNELS", "fast")
    with pytest.raises(MTPError, match="it must be auto, off or force"):
        mode_from_environment()
    monkeypatch.setenv("MTP_MLX_KERNELS", "")
    assert mode_from_environment() == "auto"


def test_where_kernels_come_from(monkeypatch: pytest.MonkeyPatch) -> None:
    assert find_factory("off") == (None, "MTP_MLX_KERNELS=off")
    monkeypatch.setattr(mx.metal, "is_available", lambda: True)
    assert find_factory("auto") == (mx.fast.metal_kernel, "Metal")
    monkeypatch.setattr(mx.metal, "is_available", lambda: False)
    assert find_factory("auto") == (None, "no Metal on this machine")
    assert find_factory("force") == (mslemu.metal_kernel, "emulator")
    with monkeypatch.context() as patch, pytest.raises(MTPError, match="neither"):
        patch.setitem(sys.modules, "mslemu", None)
        find_factory("force")
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if Path(entry).name != "tools"])
    with pytest.raises(MTPError, match="neither"):
        find_factory("force")


def test_verdict_of_every_kernel_module_can_be_asked_for() -> None:
    """Every registered kernel has all the functions the dispatcher calls."""
    for name in dispatch.KERNELS:
        module = dispatch.kernel_module(name)
        for function in ("supported", "run", "reference", "agrees", "shape_key", "samples"):
            assert callable(getattr(module, function)), (name, function)
        keys = [module.shape_key(*arguments) for arguments in module.samples()]
        assert len(set(keys)) == len(keys) > 0, f"{name}: two samples share a shape"
        assert all(module.supported(*arguments) for arguments in module.samples())
