"""A folder is there whole or not at all, and what it was to replace is not lost."""

from __future__ import annotations

import os
import shutil
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

from mtp_mlx import files
from mtp_mlx.errors import MTPError
from mtp_mlx.files import new_folder, tidy_up, write_file


def names(folder: Path) -> list[str]:
    """Everything below a folder."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def test_a_folder_and_what_it_lies_in(tmp_path: Path) -> None:
    with new_folder(tmp_path / "a" / "b" / "out") as folder:
        (folder / "x").write_text("1")
        assert not (tmp_path / "a" / "b" / "out").exists()
    assert names(tmp_path) == ["a", "a/b", "a/b/out", "a/b/out/x"]


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_nothing_is_left_of_a_failure(tmp_path: Path, error: BaseException) -> None:
    """Not even the folders that were made for it; one that was there, or has got something else, stays."""
    (tmp_path / "a").mkdir()
    with (
        pytest.raises((MTPError, KeyboardInterrupt)),
        new_folder(tmp_path / "a" / "b" / "c" / "out") as folder,
    ):
        (folder / "x").write_text("1")
        raise error
    assert names(tmp_path) == ["a"]
    with pytest.raises((MTPError, KeyboardInterrupt)), new_folder(tmp_path / "a" / "b" / "c" / "out"):
        (tmp_path / "a" / "b" / "other").write_text("1")
        raise error
    assert names(tmp_path) == ["a", "a/b", "a/b/other"]


@pytest.mark.parametrize("at", [1, 2])
@pytest.mark.parametrize("error", [OSError(5, "Input/output error"), KeyboardInterrupt()])
def test_a_failed_exchange_leaves_the_old_folder(
    tmp_path: Path, at: int, error: BaseException, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, replace, calls = tmp_path / "out", os.replace, [0]
    out.mkdir()
    (out / "old").write_text("1")

    def failing(source: Path, target: Path) -> None:
        calls[0] += 1
        if calls[0] == at:
            raise error
        replace(source, target)

    monkeypatch.setattr(os, "replace", failing)
    with pytest.raises((MTPError, KeyboardInterrupt)), new_folder(out) as folder:
        (folder / "new").write_text("1")
    assert names(tmp_path) == ["out", "out/old"]
    monkeypatch.undo()
    with new_folder(out) as folder:
        (folder / "new").write_text("1")
    assert names(tmp_path) == ["out", "out/new"]


def replaced(out: Path) -> None:
    """Replaces the two files of `out` by two others."""
    with new_folder(out) as folder:
        (folder / "new 1").write_text("1")
        (folder / "new 2").write_text("1")


def at_line(number: int, act: Callable[[], None]) -> Callable[[FrameType, str, Any], Any]:
    """A trace function that acts before the line of `mtp_mlx/files.py` that is run as number `number`."""
    left = [number]

    def trace(frame: FrameType, event: str, _: Any) -> Any:
        if frame.f_code.co_filename != files.__file__:
            return None
        if event == "line":
            left[0] -= 1
            if left[0] == 0:
                act()
        return trace

    return trace


def interrupt() -> None:
    raise KeyboardInterrupt


OLD, NEW = ["old 1", "old 2"], ["new 1", "new 2"]
LINES = 60  # more than a replacement runs


def made_anew(out: Path) -> None:
    shutil.rmtree(out.parent, ignore_errors=True)
    out.mkdir(parents=True)
    for name in OLD:
        (out / name).write_text("1")


def test_ctrl_c_at_any_line_leaves_the_old_or_the_new_folder(tmp_path: Path) -> None:
    out, seen = tmp_path / "in" / "out", set()
    for number in range(1, LINES):
        made_anew(out)
        before = sys.gettrace()
        sys.settrace(at_line(number, interrupt))
        try:
            replaced(out)
        except KeyboardInterrupt:
            pass
        finally:
            sys.settrace(before)
        assert names(out) in (OLD, NEW), number
        seen.add(names(out)[0])
        replaced(out)
        assert names(out.parent) == ["out", *(f"out/{name}" for name in NEW)], number
    assert seen == {"old 1", "new 1"}


def test_a_process_killed_at_any_line_loses_nothing(tmp_path: Path) -> None:
    """The next run finds the old or the new folder, put back if need be, and leaves nothing else."""
    out, seen, moved = tmp_path / "in" / "out", set(), 0
    for number in range(1, LINES):
        made_anew(out)
        child = os.fork()
        if child == 0:
            sys.settrace(at_line(number, lambda: os._exit(9)))
            replaced(out)
            os._exit(0)
        os.waitpid(child, 0)
        moved += not out.exists()
        tidy_up(out)
        assert names(out.parent) in [["out", *(f"out/{name}" for name in whole)] for whole in (OLD, NEW)], (
            number
        )
        seen.add(names(out)[0])
    assert moved and seen == {"old 1", "new 1"}


def test_what_another_process_is_making_is_left_alone(tmp_path: Path) -> None:
    with new_folder(tmp_path / "out") as folder:
        tidy_up(tmp_path / "out")
        (folder / "x").write_text("1")
    assert names(tmp_path) == ["out", "out/x"]


def test_two_threads_that_write_one_file(tmp_path: Path) -> None:
    """Each into a temporary file of its own: neither takes the other's away, nor is a half of each left."""
    both = threading.Barrier(2)

    def write(letter: str) -> None:
        def slowly(temporary: Path) -> None:
            temporary.write_text(letter * 4)
            both.wait(60)

        write_file(tmp_path / "states.bin", slowly)

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(write, "ab"))
    assert (tmp_path / "states.bin").read_text() in ("aaaa", "bbbb")
    assert [path.name for path in tmp_path.iterdir()] == ["states.bin"]
