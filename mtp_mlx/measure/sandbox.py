"""Runs a program that a model wrote in a process of its own, shut in as far as the system lets.

Layers, each used where it is there, and named in every outcome:
    limits    processor time, memory, size and number of open files, processes (setrlimit)
    landlock  Linux 5.13 and later: only the standard library can be read, only the own folder written
    seccomp   Linux on x86-64 and aarch64: no network, no other process, no signals to others
    seatbelt  macOS: the same by sandbox-exec (written from its documentation, not run on a Mac yet)
    audit     everywhere: Python's audit hooks refuse files outside, processes, the network and ctypes
and always: an isolated interpreter without site-packages (`python -I -S`), an empty environment, a temporary folder
that is removed, no input, no output, an end by the clock, and one when the folder has grown too large.

It is made for the mistakes of a language model: endless loops, stray files, much memory. It is not made to hold an
attacker who knows it, least of all where `audit` is the only layer.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import signal
import subprocess
import sys
import sysconfig
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path

from mtp_mlx.errors import MTPError

CHILD = Path(__file__).with_name("sandbox_child.py")
LAYERS = ("limits", "landlock", "seccomp", "seatbelt", "audit")
KERNEL_LAYERS = ("landlock", "seccomp", "seatbelt")
_SEATBELT = Path("/usr/bin/sandbox-exec")
_SYSTEM = (
    "/usr/lib",
    "/lib",
    "/lib64",
    "/usr/share/zoneinfo",
    "/etc/ld.so.cache",
    "/etc/ssl/openssl.cnf",
    "/dev/null",
    "/dev/urandom",
)
_ANSWER_BYTES = 4096
_WATCH_SECONDS = 0.1  # between two looks at what is on the disk
_BLOCK = 4096  # what an empty file takes at least, so that their number is bounded too


@dataclass(frozen=True)
class Limits:
    """What a program may take. Seconds by the clock and of the processor; bytes of memory, of one file and of all.

    The system bounds one file; all files in the program's folder are measured from outside while it runs, so it may
    write somewhat more before it is ended.
    """

    seconds: float = 10.0
    memory_bytes: int = 1 << 30
    file_bytes: int = 16 << 20
    disk_bytes: int = 64 << 20
    open_files: int = 64

    def rlimits(self) -> dict[str, int]:
        """By the names of the module `resource`."""
        return {
            "RLIMIT_CPU": int(self.seconds) + 1,
            "RLIMIT_AS": self.memory_bytes,
            "RLIMIT_FSIZE": self.file_bytes,
            "RLIMIT_NOFILE": self.open_files,
            "RLIMIT_NPROC": 0,
            "RLIMIT_CORE": 0,
        }


@dataclass(frozen=True)
class Outcome:
    """How a program ended.

    Attributes:
        passed: it ran to its end.
        reason: "passed", "time", "disk", the name of the exception that ended it, or "killed by signal N".
        seconds: by the clock, the interpreter's start included.
        layers: that were in place.
    """

    passed: bool
    reason: str
    seconds: float
    layers: tuple[str, ...]


class Sandbox:
    """Runs programs.

    Args:
        limits: of each program.
        layers: used where the system has them; all by default.
    """

    def __init__(self, limits: Limits | None = None, layers: tuple[str, ...] = LAYERS) -> None:
        self.limits, self._layers = limits or Limits(), layers

    def check(self) -> tuple[str, ...]:
        """The layers that are in place here, found by running a program.

        Raises:
            MTPError: programs cannot be run, or without any limits.
        """
        outcome = self.run("assert sorted([2, 1]) == [1, 2]")
        if not outcome.passed and "seatbelt" in self._layers and _SEATBELT.exists():
            self._layers = tuple(layer for layer in self._layers if layer != "seatbelt")
            outcome = self.run("assert sorted([2, 1]) == [1, 2]")
        if not outcome.passed:
            raise MTPError(
                f"programs cannot be run in the sandbox here ({outcome.reason}): leave --humaneval and --mbpp out"
            )
        return outcome.layers

    def run(self, program: str) -> Outcome:
        """Runs a program's text to its end, or to its limits."""
        started = time.monotonic()
        with tempfile.TemporaryDirectory(prefix="mtp-mlx-sandbox-", ignore_cleanup_errors=True) as folder:
            work = os.path.realpath(folder)
            token = secrets.token_hex(16)
            answer, ended, code = self._process(work, self._request(work, token, program))
        layers, _, said = answer.partition("\n")
        in_place = tuple(json.loads(layers)) if said or layers.endswith("]") else ()
        if self._wrapped():
            in_place = (*in_place, "seatbelt")
        passed = said == token and code == 0 and not ended
        return Outcome(passed, _reason(passed, ended, said, code), time.monotonic() - started, in_place)

    def _request(self, work: str, token: str, program: str) -> bytes:
        request = {
            "work": work,
            "readable": readable_paths(),
            "layers": self._layers,
            "limits": self.limits.rlimits(),
            "token": token,
            "program": program,
        }
        return json.dumps(request).encode()

    def _process(self, work: str, request: bytes) -> tuple[str, str, int]:
        """(what the child wrote, "time" or "disk" where that ran out or "", its exit code)."""
        reading, writing = os.pipe()
        try:
            command = [*self._wrapper(work), sys.executable, "-I", "-S", "-B", str(CHILD), str(writing)]
            process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                cwd=work,
                env={"LANG": "C.UTF-8", "PYTHONHASHSEED": "0"},
                pass_fds=(writing,),
                start_new_session=True,
            )
            os.close(writing)
            writing = -1
            ended = ""
            watch = _DiskWatch(process, work, self.limits.disk_bytes)
            try:
                with watch:
                    process.communicate(request, timeout=self.limits.seconds)
            except subprocess.TimeoutExpired:
                ended = "time"
            finally:
                _end(process)
            if watch.exceeded or disk_use(work, self.limits.disk_bytes) > self.limits.disk_bytes:
                ended = "disk"
            os.set_blocking(reading, False)
            try:
                answer = os.read(reading, _ANSWER_BYTES)
            except BlockingIOError:
                answer = b""
            return answer.decode(errors="replace"), ended, process.returncode
        finally:
            os.close(reading)
            if writing >= 0:
                os.close(writing)

    def _wrapped(self) -> bool:
        return "seatbelt" in self._layers and sys.platform == "darwin" and _SEATBELT.exists()

    def _wrapper(self, work: str) -> list[str]:
        return [str(_SEATBELT), "-p", seatbelt_profile(work)] if self._wrapped() else []


class _DiskWatch:
    """Ends a process, beside it, when its folder has grown beyond a number of bytes; `exceeded` says so."""

    def __init__(self, process: subprocess.Popen[bytes], work: str, most: int) -> None:
        self._process, self._work, self._most = process, work, most
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="mtp-mlx-sandbox-disk", daemon=True)
        self.exceeded = False

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._over.wait(_WATCH_SECONDS):
            if disk_use(self._work, self._most) > self._most:
                self.exceeded = True
                self._process.kill()
                return


def disk_use(folder: str, enough: int) -> int:
    """Bytes that files and folders take on the disk, in blocks; counted up to where there are more than `enough`."""
    used, folders = 0, [folder]
    while folders and used <= enough:
        try:
            with os.scandir(folders.pop()) as entries:
                for entry in entries:
                    with contextlib.suppress(OSError):  # it was removed meanwhile
                        used += max(entry.stat(follow_symlinks=False).st_blocks * 512, _BLOCK)
                        if entry.is_dir(follow_symlinks=False):
                            folders.append(entry.path)
                    if used > enough:
                        break
        except OSError:
            continue
    return used


def readable_paths() -> list[str]:
    """Files and folders that the interpreter itself needs: its standard library and the system's libraries."""
    paths = {
        str(CHILD),
        os.path.realpath(sys.executable),
        *(sysconfig.get_path(name) for name in ("stdlib", "platstdlib")),
        os.path.join(sys.base_prefix, "lib"),
        *_SYSTEM,
    }
    return sorted(path for path in {os.path.realpath(path) for path in paths} if os.path.exists(path))


def seatbelt_profile(work: str) -> str:
    """The rules for sandbox-exec; later ones win."""
    readable = " ".join(f'(subpath "{path}")' for path in [*readable_paths(), work])
    return (
        "(version 1)(allow default)(deny network*)(deny process-fork)(deny signal (target others))"
        f'(deny file-write*)(allow file-write* (subpath "{work}") (literal "/dev/null"))'
        f'(deny file-read-data (subpath "/Users") (subpath "/private/etc"))(allow file-read-data {readable})'
    )


def _end(process: subprocess.Popen[bytes]) -> None:
    """Ends the whole process group, whatever is left of it."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except (ProcessLookupError, PermissionError):
        pass
    process.wait()


def _reason(passed: bool, ended: str, said: str, code: int) -> str:
    if passed:
        return "passed"
    if ended == "disk":
        return ended
    if ended == "time" or code == -signal.SIGXCPU:
        return "time"
    if code < 0:
        return f"killed by signal {-code}"
    return said if code == 1 and said.isidentifier() and said != "passed" else "ended early"
