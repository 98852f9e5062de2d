"""Cache folders that nothing can be kept in: a file in its place, read-only, on a full disk, or without a home."""

from __future__ import annotations

import builtins
import errno
import os
import pwd
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mtp_mlx import files

State = Callable[[pytest.MonkeyPatch, Path], None]


def _below(path: Any, folder: Path) -> bool:
    """Whether a file lies in a folder; `path` may be the number of an open file."""
    return isinstance(path, str | os.PathLike) and folder in [Path(path), *Path(path).parents]


def a_file(patch: pytest.MonkeyPatch, cache: Path) -> None:
    cache.write_text("a file")


def read_only(patch: pytest.MonkeyPatch, cache: Path) -> None:
    """Also for root, whom permissions do not stop."""
    opened, opened_low, made = builtins.open, os.open, os.mkdir

    def refuse(path: Any) -> None:
        if _below(path, cache):
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))

    def high(path: Any, mode: str = "r", *more: Any, **named: Any) -> Any:
        if set(mode) & set("wax+"):
            refuse(path)
        return opened(path, mode, *more, **named)

    def low(path: Any, flags: int, *more: Any, **named: Any) -> int:
        if flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            refuse(path)
        return opened_low(path, flags, *more, **named)

    def make(path: Any, *more: Any, **named: Any) -> None:
        refuse(path)
        made(path, *more, **named)

    cache.mkdir()
    patch.setattr(builtins, "open", high)
    patch.setattr(os, "open", low)
    patch.setattr(os, "mkdir", make)


def full_disk(patch: pytest.MonkeyPatch, cache: Path) -> None:
    """Files can be opened, but what is written to them does not get to the disk."""

    def sync(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    patch.setattr(files.os, "fsync", sync)


def no_home(patch: pytest.MonkeyPatch, cache: Path) -> None:
    """A user who is not in the system's list of users."""

    def unknown(_: int) -> None:
        raise KeyError

    patch.delenv("MTP_MLX_CACHE")
    patch.delenv("HOME", raising=False)
    patch.setattr(pwd, "getpwuid", unknown)


def home_of_nobody(patch: pytest.MonkeyPatch, cache: Path) -> None:
    """The variable names the home of a user who does not exist."""
    patch.setenv("MTP_MLX_CACHE", "~nobody-of-this-name/cache")


STATES: dict[str, State] = {
    "a file": a_file,
    "read-only": read_only,
    "full disk": full_disk,
    "no home": no_home,
    "home of nobody": home_of_nobody,
}
