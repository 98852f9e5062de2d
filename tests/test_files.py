"""A folder is there whole or not at all, and what it was to replace is not lost."""

from __future__ import annotations

import os
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from mtp_mlx.errors import MTPError
from mtp_mlx.files import new_folder, write_file


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
