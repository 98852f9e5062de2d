"""Which kernels run: chosen per shape, on this machine, by a self-check and a race against stock MLX.

Contract: `Dispatcher.attempt(name, *arguments)` returns the kernel's outputs, or None when the caller must take
its own pure-MLX path. A kernel is used only if it supports the call, agreed with the reference on this machine, and
(mode `auto`) was faster there. Whatever stands against it is remembered with its reason and shown by `doctor`.
A kernel that cannot be compiled or launched, or is wrong, is demoted once and never tried again in this process.

Modes (environment variable MTP_MLX_KERNELS)
    auto    as above; on a machine without Metal, never
    off     never
    force   every supported call runs the kernel, checked but not raced; without Metal by the stand-in for it that
            an entry point of the group `mtp_mlx.kernel_factories` names (as the emulator in tools/ does)

Verdicts (`verdicts.py`) are kept in the cache folder and belong to one device, system, MLX version and kernel text.
With Metal, kernels run only while the GPU is MLX's default device, as their launches always go there.
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
from mtp_mlx.metal_kernels.launch import Factory, Support
from mtp_mlx.metal_kernels.race import race
from mtp_mlx.metal_kernels.verdicts import Verdict, Verdicts, machine_key

KERNELS = ("verify_tail", "small_m_qmm", "row_exact", "block_attention", "gated_lora", "lm_head_pick")
MODE_VARIABLE = "MTP_MLX_KERNELS"
STAND_INS = "mtp_mlx.kernel_factories"  # entry points: name = what `mx.fast.metal_kernel` is elsewhere
FAILED = "failed: "
MUST_WIN_BY = 0.98  # a kernel is used when its time is at most this share of the reference's
Mode = Literal["auto", "off", "force"]

log = logging.getLogger("mtp_mlx")


class KernelModule(Protocol):
    """What a kernel's module offers; all take the same arguments.

    Where the model's own code does more with the result than `run`, or other operations than `reference`, a module
    also has `in_place(factory, arguments)`: the two calls that are raced, each of the same arguments.
    """

    def supported(self, *arguments: Any) -> Support: ...
    def run(self, factory: Factory, *arguments: Any) -> Any: ...
    def reference(self, *arguments: Any) -> Any: ...
    def agrees(self, ours: Any, theirs: Any) -> bool: ...
    def shape_key(self, *arguments: Any) -> str: ...
    def samples(self) -> list[tuple[Any, ...]]: ...


def kernel_module(name: str) -> KernelModule:
    """The module of a kernel, imported when first asked for."""
    return cast("KernelModule", importlib.import_module(f"mtp_mlx.metal_kernels.{name}"))


def mode_from_environment() -> Mode:
    """The mode MTP_MLX_KERNELS asks for.

    Raises:
        MTPError: it is none of the three.
    """
    mode = os.environ.get(MODE_VARIABLE, "auto") or "auto"
    if mode not in ("auto", "off", "force"):
        raise MTPError(f"{MODE_VARIABLE} is {mode!r}; it can be auto, off or force")
    return cast("Mode", mode)


def find_factory(mode: Mode) -> tuple[Factory | None, str]:
    """What turns kernel text into something callable here, and its name (or why there is none).

    Raises:
        MTPError: mode `force` on a machine with neither Metal nor a stand-in for it.
    """
    if mode == "off":
        return None, f"{MODE_VARIABLE}=off"
    if mx.metal.is_available():
        return mx.fast.metal_kernel, "Metal"
    if mode == "auto":
        return None, "no Metal on this machine"
    return _stand_in()


def _stand_in() -> tuple[Factory, str]:
    """What executes kernel text where there is no Metal, and its name.

    Raises:
        MTPError: there is none.
    """
    for found in importlib.metadata.entry_points(group=STAND_INS):
        with suppress(ImportError):
            return cast("Factory", found.load()), found.name
    raise MTPError(
        f"{MODE_VARIABLE}=force needs Metal or the emulator, and this machine has neither: put the repository's "
        "tools/ folder on PYTHONPATH, or unset the variable"
    )


class Dispatcher:
    """Runs a kernel or its reference, and knows why.

    Args:
        mode: see the module.
        factory: from `find_factory`; None when no kernel can run.
        factory_name: what to call it in reports.
        cache_file: where verdicts of races are kept; None keeps them in memory.

    Attributes:
        verdicts: by "kernel shape".
        demoted: why a kernel failed here, by its name; it is not tried again in this process.
        counts: calls by (kernel, "kernel" or the reason why not).
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
        """Whether any kernel can run here at all; if not, callers need not ask."""
        return self.factory is not None

    @property
    def description(self) -> str:
        """What a measurement made with this dispatcher depends on."""
        return f"{self.factory_name} {self.mode} {dict(machine_key())['kernels']}"

    def attempt(self, name: str, *arguments: Any) -> Any | None:
        """The kernel's outputs, or None: not supported, failed here, or slower than stock MLX."""
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
        # What is wrong before anything runs, of whatever type; the GPU's own errors come to light in `judge`.
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
        log.warning("the kernel %s is not used any more, stock MLX takes its place: %s", name, reason)

    def judge_samples(self, name: str, raced: bool) -> dict[str, Verdict]:
        """{shape: verdict} of the kernel's own sample arguments, judged now."""
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
    """Self-check, then the race. A kernel that raises anything is a kernel that is not used; what its arguments are
    made of is evaluated before, and raises as ever."""
    mx.eval(tree_map(lambda value: value if isinstance(value, mx.array) else None, list(arguments)))
    try:
        ours, theirs = module.run(factory, *arguments), module.reference(*arguments)
        mx.eval(ours, theirs)
        if not module.agrees(ours, theirs):
            return Verdict(False, f"{FAILED}its result differs from stock MLX")
        if not raced:
            return Verdict(True, "forced; self-check passed")
        ratio = race(*_lanes(module, factory, arguments), arguments)
    except Exception as error:  # compile errors and thread limits of the GPU at hand arrive as any type
        return Verdict(False, FAILED + _sentence(error))
    won = ratio <= MUST_WIN_BY
    return Verdict(won, f"self-check passed, {'won' if won else 'lost'} its race", round(ratio, 3))


def _lanes(module: KernelModule, factory: Factory, arguments: tuple[Any, ...]) -> tuple[Any, Any]:
    """The two calls to race, with the kernel and without."""
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
    """The process's dispatcher, made from MTP_MLX_KERNELS when first asked for.

    Args:
        cache_dir: where verdicts are kept, asked only when a kernel can run here.

    Raises:
        MTPError: see `mode_from_environment` and `find_factory`.
    """
    global _process_wide
    mode = mode_from_environment()
    if _process_wide is None or _process_wide.mode != mode:
        factory, name = find_factory(mode)
        cache_file = None
        if factory is not None and mode == "auto" and cache_dir is not None:
            cache_file = cache_dir() / "kernels.json"
        _process_wide = Dispatcher(mode, factory, name, cache_file)
    return _process_wide
