"""Proves that a program in the sandbox cannot read outside, fork, connect, loop or take memory without end."""

from __future__ import annotations

import os
import socket
import sys
from pathlib import Path

import pytest

from mtp_mlx.errors import MTPError
from mtp_mlx.measure.sandbox import KERNEL_LAYERS, LAYERS, Limits, Sandbox, readable_paths, seatbelt_profile

QUICK = Limits(seconds=20.0, memory_bytes=512 << 20)
KERNEL = ("limits", "landlock", "seccomp")
IN_PLACE = Sandbox(QUICK, KERNEL).check()
needs_kernel = pytest.mark.skipif(
    not {"landlock", "seccomp"} <= set(IN_PLACE), reason="this kernel has no Landlock or no seccomp filters"
)
# Every rule is proven for Python's layer alone and for the kernel's alone, so that neither hides a hole in the other.
EITHER = [
    pytest.param(KERNEL, id="kernel", marks=needs_kernel),
    pytest.param(("limits", "audit"), id="audit"),
]


def ended(program: str, layers: tuple[str, ...] = LAYERS, limits: Limits = QUICK) -> str:
    outcome = Sandbox(limits, layers).run(program)
    assert outcome.passed == (outcome.reason == "passed")
    return outcome.reason


def test_what_is_allowed() -> None:
    program = """
import bisect, collections, copy, datetime, decimal, fractions, functools, hashlib, heapq, itertools, json, math
import operator, os, random, re, statistics, string, sys, typing
assert hashlib.md5(b"x").hexdigest() and math.sqrt(4) == 2
open("own.txt", "w").write("text")
assert open("own.txt").read() == "text" and os.listdir(".") == ["own.txt"]
os.remove("own.txt")
Point = collections.namedtuple("Point", "x y")
assert Point(1, 2).y == 2 and sys.stdin.read() == "" and not os.environ
print("much " * 100_000)
"""
    outcome = Sandbox(QUICK).run(program)
    assert outcome.reason == "passed" and "audit" in outcome.layers
    assert "limits" in outcome.layers or sys.platform == "darwin"


def test_a_program_is_a_module_of_its_own() -> None:
    """It finds its own names as an imported one does, and nothing of what runs it: no future import either."""
    program = """
import dataclasses, pickle, sys, typing
@dataclasses.dataclass
class Point:
    x: int
    kind: typing.ClassVar[int] = 5
def name(number: int) -> str: ...
assert name.__annotations__ == {"number": int, "return": str} and typing.get_type_hints(Point)["x"] is int
assert [field.name for field in dataclasses.fields(Point)] == ["x"]
assert pickle.loads(pickle.dumps(Point(1))) == Point(1) and sys.modules[__name__].Point is Point
assert not {"json", "REFUSED", "token"} & set(globals())
"""
    assert ended(program) == "passed"
    assert ended("def name(number: Number): ...") == "NameError"


@pytest.mark.parametrize("layers", EITHER)
def test_no_file_outside_is_read_or_written(layers: tuple[str, ...], tmp_path: Path) -> None:
    secret = tmp_path / "secret.txt"
    secret.write_text("secret")
    (tmp_path / "empty").mkdir()
    for action in (
        f"open({str(secret)!r}).read()",
        "open('/etc/passwd').read()",
        f"import os; os.open({str(secret)!r}, os.O_RDONLY)",
        f"import os; os.symlink({str(secret)!r}, 'link'); open('link').read()",
        f"import os; os.listdir({str(tmp_path)!r})",
        f"open({str(tmp_path / 'new.txt')!r}, 'w')",
        f"open({str(secret)!r}, 'r+')",
        f"import os; os.remove({str(secret)!r})",
        f"import os; os.rename({str(secret)!r}, {str(tmp_path / 'moved')!r})",
        f"import os; os.rmdir({str(tmp_path / 'empty')!r})",
        f"import os; os.truncate({str(secret)!r}, 0)",
        f"import os; os.chmod({str(secret)!r}, 0)",
    ):
        assert ended(action, layers) in ("PermissionError", "OSError"), action
    assert secret.read_text() == "secret" and secret.stat().st_mode & 0o600 == 0o600
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "secret.txt"]


@pytest.mark.parametrize("layers", EITHER)
def test_no_other_process(layers: tuple[str, ...]) -> None:
    for action in (
        "import os; os.fork()",
        "import subprocess; subprocess.run(['/bin/true'])",
        "import os; assert os.system('/bin/true') == 0",
        "import os; os.execv('/bin/true', ['true'])",
        f"import os; os.kill({os.getpid()}, 0)",
    ):
        assert ended(action, layers) in ("PermissionError", "BlockingIOError", "AssertionError"), action


@pytest.mark.parametrize("layers", EITHER)
def test_no_network(layers: tuple[str, ...]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        action = f"import socket; socket.create_connection(('127.0.0.1', {port}), 2).close()"
        assert ended(action, layers) == "PermissionError"
        server.setblocking(False)
        with pytest.raises(BlockingIOError):  # nobody waits in the queue
            server.accept()


@needs_kernel
def test_ctypes_does_not_get_round_the_kernel() -> None:
    """Python's layer refuses ctypes; where it is not there, the kernel still refuses what ctypes would call."""
    fork = "import ctypes; assert ctypes.CDLL(None).fork() >= 0"
    assert ended(fork, ("limits", "audit")) == "PermissionError"
    assert ended(fork, KERNEL) == "AssertionError"
    read = "import ctypes; assert ctypes.CDLL(None).open(b'/etc/passwd', 0) >= 0"
    assert ended(read, KERNEL) == "AssertionError"
    limits = "import resource; resource.setrlimit(resource.RLIMIT_NPROC, (9, 9))"
    assert ended(limits, KERNEL) in ("PermissionError", "ValueError")


@pytest.mark.parametrize("program", ["while True: pass", "import time; time.sleep(60)"])
def test_an_endless_program_is_ended(program: str) -> None:
    outcome = Sandbox(Limits(seconds=1.5)).run(program)
    assert outcome.reason == "time" and not outcome.passed and outcome.seconds < 20


@pytest.mark.skipif(sys.platform == "darwin", reason="macOS does not enforce a limit on address space")
def test_memory_is_bounded() -> None:
    assert ended("x = [0]\nwhile True: x = x * 2") == "MemoryError"
    assert ended("x = bytearray(1 << 30)") == "MemoryError"


def test_files_are_bounded() -> None:
    big = "f = open('f', 'wb')\nfor _ in range(64): f.write(bytes(1 << 20))\nf.flush()"
    assert ended(big) in ("OSError", f"killed by signal {25}")
    many = "kept = [open(str(i), 'w') for i in range(500)]"
    assert ended(many) == "OSError"


MANY_FILES = """
import os, time
for name in range(COUNT):
    with open(f"{name}.txt", "wb") as file: file.write(os.urandom(SIZE))
time.sleep(PAUSE)
"""


@pytest.mark.parametrize(
    ("size", "pause"), [(2 << 20, 60), (2 << 20, 0), (0, 60)], ids=["runs", "ends", "empty"]
)
def test_the_disk_is_bounded(size: int, pause: int) -> None:
    """By all files together, none of which is too large; also where the program has ended before anybody looked."""
    limits = Limits(seconds=40.0, disk_bytes=8 << 20)
    program = MANY_FILES.replace("SIZE", str(size)).replace("PAUSE", str(pause))
    too_many = 8 if size else 3000
    outcome = Sandbox(limits).run(program.replace("COUNT", str(too_many)))
    assert outcome.reason == "disk" and not outcome.passed and outcome.seconds < 30
    allowed = Sandbox(limits).run(program.replace("COUNT", "3").replace(f"sleep({pause})", "sleep(0.3)"))
    assert allowed.passed


FORGED = """
import os
for fd in range(3, 40):
    try: os.write(fd, b"passed")
    except OSError: pass
os._exit(0)
"""


@pytest.mark.parametrize(
    ("program", "reason"),
    [
        ("import sys; sys.exit(0)", "SystemExit"),
        ("import os; os._exit(0)", "ended early"),
        ("assert 1 == 2", "AssertionError"),
        ("def f(:", "SyntaxError"),
        (FORGED, "ended early"),
        ("import numpy", "ModuleNotFoundError"),
        ("import mtp_mlx", "ModuleNotFoundError"),
        ("input()", "EOFError"),
    ],
)
def test_only_the_end_passes(program: str, reason: str) -> None:
    assert ended(program) == reason


def test_nothing_is_left_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert ended("open('a', 'w').write('x')") == "passed"
    assert list(tmp_path.iterdir()) == []
    before = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0
    ended("pass")
    assert before == (len(os.listdir("/proc/self/fd")) if before else 0), "no descriptor stays open"


def test_check_refuses_where_nothing_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mtp_mlx.measure.sandbox.CHILD", Path("/nowhere/child.py"))
    with pytest.raises(MTPError, match="programs cannot be run in the sandbox here"):
        Sandbox(QUICK).check()


def test_what_can_be_read_is_the_interpreter_s() -> None:
    assert all(os.path.isabs(path) for path in readable_paths())
    assert not {"/", "/etc", "/home", "/root", "/tmp", os.getcwd()} & set(readable_paths())
    profile = seatbelt_profile("/work")
    assert profile.count("(") == profile.count(")") and '(allow file-write* (subpath "/work")' in profile
    assert set(KERNEL_LAYERS) < set(LAYERS)
