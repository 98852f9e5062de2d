"""Which kernels run: chosen per shape, on this machine, by a self-check and a race against stock MLX.

Contract: `Dispatcher.attempt(name, *arguments)` returns the kernel's outputs, or None when the caller must take
its own pure-MLX path. A kernel is used only if it supports the call, agreed with the reference on this machine, and
(mode `auto`) was faster there. Whatever stands against it is remembered with its reason and shown by `doctor`.
A kernel that cannot be compiled or launched is demoted once and never tried again in this process.

Modes (environment variable MTP_MLX_KERNELS)
    auto    as above; on a machine without Metal, never
    off     never
    force   every supported call runs the kernel, checked but not raced; without Metal through the emulator in the
            repository's tools/ folder, which must then be importable

Verdicts are written to the cache folder and belong to one device, system, MLX version and kernel text.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.metadata
import json
import logging
import os
import platform
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, cast

import mlx.core as mx

from mtp_mlx.errors import MTPError
from mtp_mlx.files import write_text
from mtp_mlx.metal_kernels.launch import Factory, Support
from mtp_mlx.metal_kernels.race import race

KERNELS = ("verify_tail", "small_m_qmm", "row_exact", "block_attention", "gated_lora", "lm_head_pick")
MODE_VARIABLE = "MTP_MLX_KERNELS"
MUST_WIN_BY = 0.98  # a kernel is used when its time is at most this share of the reference's
Mode = Literal["auto", "off", "force"]

log = logging.getLogger("mtp_mlx")


class KernelModule(Protocol):
    """What a kernel's module offers; all take the same arguments."""

    def supported(self, *arguments: Any) -> Support: ...
    def run(self, factory: Factory, *arguments: Any) -> Any: ...
    def reference(self, *arguments: Any) -> Any: ...
    def agrees(self, ours: Any, theirs: Any) -> bool: ...
    def shape_key(self, *arguments: Any) -> str: ...
    def samples(self) -> list[tuple[Any, ...]]: ...


@dataclass(frozen=True)
class Verdict:
    """What was decided for one kernel and shape.

    Attributes:
        uses_kernel: whether calls of this shape run the kernel.
        reason: why, in a few words.
        time_ratio: kernel time over reference time; None when not raced.
    """

    uses_kernel: bool
    reason: str
    time_ratio: float | None = None


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
        MTPError: mode `force` on a machine with neither Metal nor the emulator.
    """
    if mode == "off":
        return None, f"{MODE_VARIABLE}=off"
    if mx.metal.is_available():
        return mx.fast.metal_kernel, "Metal"
    if mode == "auto":
        return None, "no Metal on this machine"
    try:
        emulator = importlib.import_module("mslemu")
    except ImportError as error:
        raise MTPError(
            f"{MODE_VARIABLE}=force needs Metal or the emulator, and this machine has neither: put the "
            "repository's tools/ folder on PYTHONPATH, or unset the variable"
        ) from error
    return cast("Factory", emulator.metal_kernel), "emulator"


class Dispatcher:
    """Runs a kernel or its reference, and knows why.

    Args:
        mode: see the module.
        factory: from `find_factory`; None when no kernel can run.
        factory_name: what to call it in reports.
        cache_file: where verdicts of races are kept; None keeps them in memory.

    Attributes:
        verdicts: by "kernel shape".
        counts: calls by (kernel, "kernel" or the reason why not).
    """

    def __init__(
        self, mode: Mode, factory: Factory | None, factory_name: str, cache_file: Path | None = None
    ) -> None:
        self.mode, self.factory, self.factory_name = mode, factory, factory_name
        self.counts: Counter[tuple[str, str]] = Counter()
        self._cache_file = cache_file
        self.verdicts: dict[str, Verdict] = {} if cache_file is None else _read_verdicts(cache_file)

    @property
    def active(self) -> bool:
        """Whether any kernel can run here at all; if not, callers need not ask."""
        return self.factory is not None

    def attempt(self, name: str, *arguments: Any) -> Any | None:
        """The kernel's outputs, or None: not supported, failed its check, or slower than stock MLX."""
        if self.factory is None:
            return None
        module = kernel_module(name)
        verdict = self._verdict(name, module, arguments)
        self.counts[name, "kernel" if verdict.uses_kernel else verdict.reason] += 1
        return module.run(self.factory, *arguments) if verdict.uses_kernel else None

    def _verdict(self, name: str, module: KernelModule, arguments: tuple[Any, ...]) -> Verdict:
        support = module.supported(*arguments)
        if not support:
            return Verdict(False, support.reason)
        key = f"{name} {module.shape_key(*arguments)}"
        if key not in self.verdicts:
            self._decide(key, module, arguments)
        return self.verdicts[key]

    def _decide(self, key: str, module: KernelModule, arguments: tuple[Any, ...]) -> None:
        verdict = judge(module, arguments, cast("Factory", self.factory), raced=self.mode == "auto")
        self.verdicts[key] = verdict
        if not verdict.uses_kernel:
            log.warning("kernel %s is not used: %s", key, verdict.reason)
        if self._cache_file is not None and self.mode == "auto":
            _write_verdicts(self._cache_file, self.verdicts)

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
    """Self-check, then the race. Never raises: a kernel that fails is a kernel that is not used."""
    try:
        ours, theirs = module.run(factory, *arguments), module.reference(*arguments)
        mx.eval(ours, theirs)
    except Exception as error:  # compile errors and thread limits of the GPU at hand arrive as any type
        sentence = str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
        return Verdict(False, f"failed: {sentence}")
    if not module.agrees(ours, theirs):
        return Verdict(False, "self-check: its result differs from stock MLX")
    if not raced:
        return Verdict(True, "forced; self-check passed")
    ratio = race(lambda *a: module.run(factory, *a), lambda *a: module.reference(*a), arguments)
    if ratio <= MUST_WIN_BY:
        return Verdict(True, "self-check passed, won its race", round(ratio, 3))
    return Verdict(False, "self-check passed, lost its race", round(ratio, 3))


# --- verdicts on disk ---------------------------------------------------------------------------------------


def machine_key() -> dict[str, str]:
    """What verdicts belong to: device, system, MLX and the kernels' own text."""
    device = mx.device_info() if hasattr(mx, "device_info") else {}
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("*")):
        if path.suffix in (".metal", ".py"):
            digest.update(path.read_bytes())
    return {
        "device": str(device.get("device_name", platform.machine())),
        "system": platform.platform(),
        "mlx": importlib.metadata.version("mlx"),
        "kernels": digest.hexdigest()[:16],
    }


def _read_verdicts(path: Path) -> dict[str, Verdict]:
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        log.warning("%s cannot be read (%s); the kernels are judged again", path, error)
        return {}
    try:
        if stored["machine"] != machine_key():
            return {}
        return {key: Verdict(**value) for key, value in stored["verdicts"].items()}
    except (KeyError, TypeError, AttributeError):
        log.warning("%s is damaged; the kernels are judged again", path)
        return {}


def _write_verdicts(path: Path, verdicts: dict[str, Verdict]) -> None:
    stored = {"machine": machine_key(), "verdicts": {key: asdict(value) for key, value in verdicts.items()}}
    try:
        write_text(path, json.dumps(stored, indent=2) + "\n")
    except MTPError as error:  # a full disk must not stop generation; the verdict is kept in memory
        log.warning("verdicts on kernels are not kept: %s", error)


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
