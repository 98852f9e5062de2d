"""Decides which kernels run: per shape, on this machine, by a self-check and a race against MLX.

Contract: `Dispatcher.attempt(name, *arguments)` returns the kernel's outputs, or None if the caller must take its
own pure-MLX path. A kernel is used only if it supports the call, agreed with the reference on this machine and, in
mode `auto`, was faster. The reason for not using a kernel is recorded, and shown by `doctor`. A kernel that fails
to compile or launch, or gives a wrong result, is demoted and not tried again in this process.

Modes (environment variable MTP_MLX_KERNELS)
    auto    as above; without Metal, kernels are off
    off     no kernel runs
    force   every supported call runs the kernel, checked but not raced; without Metal, a substitute named by an entry
            point of the group `mtp_mlx.kernel_factories` runs it (the emulator in tools/ provides one)

Verdicts (`verdicts.py`) are kept in the cache folder, for one device, system, MLX version and kernel source. With
Metal, kernels run only while the GPU is MLX's default device, because their launches always go there.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import logging
import os
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal, Protocol, cast

import mlx.core as mx
from mlx.utils import tree_map

from mtp_mlx.errors import MTPError
from mtp_mlx.files import warn_once
from mtp_mlx.metal_kernels.launch import Factory, Support
from mtp_mlx.metal_kernels.race import race
from mtp_mlx.metal_kernels.verdicts import VERDICTS, Verdict, Verdicts, machine_key

KERNELS = ("verify_tail", "small_m_qmm", "row_exact", "block_attention", "gated_lora", "lm_head_pick")
MODE_VARIABLE = "MTP_MLX_KERNELS"
STAND_INS = (
    "mtp_mlx.kernel_factories"  # entry points that replace `mx.fast.metal_kernel` on machines without Metal
)
FAILED = "failed: "
MUST_WIN_BY = 0.98  # a kernel is used if its time is at most this fraction of the reference's
Mode = Literal["auto", "off", "force"]

log = logging.getLogger("mtp_mlx")


class KernelModule(Protocol):
    """The functions of a kernel's module; all take the same arguments.

    If the model does more with the result than `run`, or uses other operations than `reference`, the module also has
    `in_place(factory, arguments)`: the two functions to race, each called with the same arguments.
    """

    def supported(self, *arguments: Any) -> Support: ...
    def run(self, factory: Factory, *arguments: Any) -> Any: ...
    def reference(self, *arguments: Any) -> Any: ...
    def agrees(self, ours: Any, theirs: Any) -> bool: ...
    def shape_key(self, *arguments: Any) -> str: ...
    def samples(self) -> list[tuple[Any, ...]]: ...


def kernel_module(name: str) -> KernelModule:
    """The module of a kernel, imported on first use."""
    return cast("KernelModule", importlib.import_module(f"mtp_mlx.metal_kernels.{name}"))


def mode_from_environment() -> Mode:
    """The mode set by MTP_MLX_KERNELS.

    Raises:
        MTPError: if it is not one of the three modes.
    """
    mode = os.environ.get(MODE_VARIABLE, "auto") or "auto"
    if mode not in ("auto", "off", "force"):
        raise MTPError(f"{MODE_VARIABLE} is {mode!r}; it must be auto, off or force")
    return cast("Mode", mode)


def find_factory(mode: Mode) -> tuple[Factory | None, str]:
    """The function that builds kernels from source here, and its name (or why there is none).

    Raises:
        MTPError: if the mode is `force` and the machine has neither Metal nor a substitute.
    """
    if mode == "off":
        return None, f"{MODE_VARIABLE}=off"
    if mx.metal.is_available():
        return mx.fast.metal_kernel, "Metal"
    if mode == "auto":
        return None, "no Metal on this machine"
    return _stand_in()


def _stand_in() -> tuple[Factory, str]:
    """The substitute for `mx.fast.metal_kernel` without Metal, and its name.

    Raises:
        MTPError: if there is none.
    """
    for found in importlib.metadata.entry_points(group=STAND_INS):
        with suppress(ImportError):
            return cast("Factory", found.load()), found.name
    raise MTPError(
        f"{MODE_VARIABLE}=force needs Metal or the emulator, and this machine has neither: put the repository's "
        "tools/ folder on PYTHONPATH, or unset the variable"
    )


class Dispatcher:
    """Decides for every call whether a kernel runs, and records why.

    Args:
        mode: see the module.
        factory: from `find_factory`; None if no kernel can run.
        factory_name: its name in reports.
        cache_file: where to keep verdicts; None keeps them in memory.

    Attributes:
        verdicts: by "kernel shape".
        demoted: kernel name -> why it failed; it is not tried again in this process.
        counts: calls by (kernel, "kernel" or the reason for not using it).
    """

    def __init__(
        self, mode: Mode, factory: Factory | None, factory_name: str, cache_file: Path | None = None
    ) -> None:
        self.mode, self.factory, self.factory_name = mode, factory, factory_name
        self.verdicts = Verdicts(cache_file)
        self.demoted: dict[str, str] = {}
        self.counts: Counter[tuple[str, str]] = Counter()
        self._needs_gpu = factory is mx.fast.metal_kernel

    @property
    def active(self) -> bool:
        """Whether any kernel can run here; if not, callers need not ask."""
        return self.factory is not None

    @property
    def description(self) -> str:
        """What timings made with this dispatcher depend on."""
        return f"{self.factory_name} {self.mode} {dict(machine_key())['kernels']}"

    def attempt(self, name: str, *arguments: Any) -> Any | None:
        """The kernel's outputs, or None if it is not supported, failed here, or is slower than MLX."""
        if self.factory is None:
            return None
        if name in self.demoted:
            self.counts[name, self.demoted[name]] += 1
            return None
        if self._needs_gpu and mx.default_device().type != mx.DeviceType.gpu:
            return None
        module = kernel_module(name)
        verdict = self._verdict(name, module, arguments)
        self.counts[name, "kernel" if verdict.uses_kernel else verdict.reason] += 1
        if not verdict.uses_kernel:
            return None
        # Errors before the launch, of any type; errors on the GPU show up in `judge`.
        try:
            return module.run(self.factory, *arguments)
        except Exception as error:
            self._demote(name, _sentence(error))
            return None

    def report(self) -> dict[str, int]:
        """{"kernel: lane or reason": calls}, for `--json`."""
        return {f"{name}: {lane}": count for (name, lane), count in sorted(self.counts.items())}

    def _verdict(self, name: str, module: KernelModule, arguments: tuple[Any, ...]) -> Verdict:
        support = module.supported(*arguments)
        if not support:
            return Verdict(False, support.reason)
        key = f"{name} {module.shape_key(*arguments)}"
        if key not in self.verdicts:
            verdict = judge(module, arguments, cast("Factory", self.factory), raced=self.mode == "auto")
            if verdict.reason.startswith(FAILED):
                self._demote(name, verdict.reason)
                return verdict
            self.verdicts.add(key, verdict)
            log.info("kernel %s: %s", key, verdict.reason)
        return self.verdicts[key]

    def _demote(self, name: str, reason: str) -> None:
        self.demoted[name] = reason
        log.warning("the kernel %s is no longer used, MLX takes its place: %s", name, reason)

    def judge_samples(self, name: str, raced: bool) -> dict[str, Verdict]:
        """{shape: verdict} of the kernel's sample calls, judged now."""
        module = kernel_module(name)
        results = {}
        for arguments in module.samples():
            support = module.supported(*arguments)
            if self.factory is None:
                verdict = Verdict(False, self.factory_name)
            elif not support:
                verdict = Verdict(False, support.reason)
            else:
                verdict = judge(module, arguments, self.factory, raced)
            results[module.shape_key(*arguments)] = verdict
        return results


def judge(module: KernelModule, arguments: tuple[Any, ...], factory: Factory, raced: bool) -> Verdict:
    """Run the self-check, then the race. A kernel that raises any error is not used. The arguments are evaluated
    beforehand, so that errors in computing them are raised as usual."""
    mx.eval(tree_map(lambda value: value if isinstance(value, mx.array) else None, list(arguments)))
    try:
        ours, theirs = module.run(factory, *arguments), module.reference(*arguments)
        mx.eval(ours, theirs)
        if not module.agrees(ours, theirs):
            return Verdict(False, f"{FAILED}its result differs from MLX's")
        if not raced:
            return Verdict(True, "forced; self-check passed")
        ratio = race(*_lanes(module, factory, arguments), arguments)
    except Exception as error:  # compile errors and exceeded thread limits can be of any type
        return Verdict(False, FAILED + _sentence(error))
    won = ratio <= MUST_WIN_BY
    return Verdict(won, f"self-check passed, {'won' if won else 'lost'} its race", round(ratio, 3))


def _lanes(module: KernelModule, factory: Factory, arguments: tuple[Any, ...]) -> tuple[Any, Any]:
    """The two functions to race: with the kernel and without it."""
    in_place = getattr(module, "in_place", None)
    if in_place is not None:
        return cast("tuple[Any, Any]", in_place(factory, arguments))
    return lambda *a: module.run(factory, *a), module.reference


def _sentence(error: Exception) -> str:
    """The first line of an error."""
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else type(error).__name__


_process_wide: Dispatcher | None = None


def default_dispatcher(cache_dir: Callable[[], Path] | None = None) -> Dispatcher:
    """The dispatcher of this process, created on first use from MTP_MLX_KERNELS.

    Args:
        cache_dir: returns the folder for verdicts; called only if a kernel can run here.

    Raises:
        MTPError: see `mode_from_environment` and `find_factory`.
    """
    global _process_wide
    mode = mode_from_environment()
    if _process_wide is None or _process_wide.mode != mode:
        factory, name = find_factory(mode)
        cache_file = None
        if factory is not None and mode == "auto" and cache_dir is not None:
            try:
                cache_file = cache_dir() / "kernels.json"
            except MTPError as error:
                warn_once(VERDICTS, f"{VERDICTS} are not kept for later runs ({error})")
        _process_wide = Dispatcher(mode, factory, name, cache_file)
    return _process_wide
