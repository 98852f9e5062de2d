"""Verdicts on the kernels on this machine, in memory and on disk."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import logging
import platform
import threading
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path

import mlx.core as mx

from mtp_mlx.files import keep_if_possible, write_text

VERDICTS = "verdicts on kernels"  # in warnings

log = logging.getLogger("mtp_mlx")


@dataclass(frozen=True)
class Verdict:
    """The verdict on one kernel and shape.

    Attributes:
        uses_kernel: whether calls of this shape run the kernel.
        reason: why, in a few words.
        time_ratio: the kernel's time divided by MLX's; None if it was not raced.
    """

    uses_kernel: bool
    reason: str
    time_ratio: float | None = None


@cache
def machine_key() -> tuple[tuple[str, str], ...]:
    """What verdicts are valid for: device, system, MLX version and kernel source, as (name, value) pairs."""
    device = mx.device_info() if hasattr(mx, "device_info") else {}
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("*")):
        if path.suffix in (".metal", ".py"):
            digest.update(path.read_bytes())
    return (
        ("device", str(device.get("device_name", platform.machine()))),
        ("system", platform.platform()),
        ("mlx", importlib.metadata.version("mlx")),
        ("kernels", digest.hexdigest()[:16]),
    )


class Verdicts(dict[str, Verdict]):
    """Verdicts by "kernel shape".

    Args:
        path: the file in which they are kept; None keeps them in memory. A file from another machine, MLX version or
            kernel source counts as empty, and so does a damaged one (reported once).
    """

    def __init__(self, path: Path | None = None) -> None:
        super().__init__(_read(path, log.warning) if path is not None else {})
        self._path = path
        self._lock = threading.Lock()

    def add(self, key: str, verdict: Verdict) -> None:
        """Record a verdict, also on disk, where verdicts written by other processes are kept."""
        with self._lock:
            self[key] = verdict
            if self._path is None:
                return
            for other, theirs in _read(self._path, log.debug).items():
                self.setdefault(other, theirs)
            stored = {name: asdict(one) for name, one in self.items()}
            text = json.dumps({"machine": dict(machine_key()), "verdicts": stored}, indent=2)
            path = self._path
            if not keep_if_possible(lambda: write_text(path, text + "\n"), VERDICTS):
                self._path = None

    def forget(self) -> None:
        """Delete all verdicts, also on disk, so that every shape is judged again."""
        with self._lock:
            self.clear()
            if self._path is not None:
                self._path.unlink(missing_ok=True)


def _read(path: Path, tell: Callable[..., None]) -> dict[str, Verdict]:
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except (OSError, ValueError) as error:
        tell("%s cannot be read (%s); the kernels are judged again", path, error)
        return {}
    try:
        if stored["machine"] != dict(machine_key()):
            return {}
        return {key: Verdict(**value) for key, value in stored["verdicts"].items()}
    except (KeyError, TypeError, AttributeError):
        tell("%s is damaged; the kernels are judged again", path)
        return {}
