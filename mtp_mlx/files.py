"""Writing files whole: under a temporary name, then renamed, so that nobody ever reads half of one."""

from __future__ import annotations

import errno
import fcntl
import glob
import logging
import os
import secrets
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from mtp_mlx.errors import MTPError

log = logging.getLogger("mtp_mlx")
_warned: dict[
    str, str
] = {}  # what could not be kept in the cache or read from it; people are told once of each
_WORKSHOP = ".unfinished"  # ends the name of a folder in which another one is being made
_LOCK = "lock"  # in it, locked as long as that goes on


def user_path(name: str) -> Path:
    """The path that a person wrote; "~" stands for a home folder.

    Raises:
        MTPError: if there is no such home folder, or no file can have that name.
    """
    if "\0" in name:
        raise MTPError("a file name cannot contain the character 0: give another one")
    try:
        path = Path(name).expanduser()
        path.exists()  # an OSError where a part of it is too long
    except RuntimeError:
        raise MTPError(f"{name}: there is no such home folder; give the whole path") from None
    except OSError as error:
        raise MTPError(f"{name}: {(error.strerror or str(error)).lower()}; give another file") from None
    return path


@contextmanager
def clear_errors(path: Path) -> Iterator[None]:
    """Turns an operating-system error about `path` into a sentence.

    Raises:
        MTPError: for a full disk, a missing permission, or any other OSError; it names the path.
    """
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise MTPError(
                f"the disk is full: {path} could not be written; free some space and run it again"
            ) from error
        raise MTPError(f"{path} could not be written: {error.strerror or error}") from error
    except RuntimeError as error:  # mlx reports a failed write this way
        if "write" in str(error).lower() or "open" in str(error).lower():
            raise MTPError(
                f"{path} could not be written ({error}); is the disk full or the folder read-only?"
            ) from error
        raise


def write_file(path: Path, write: Callable[[Path], None]) -> None:
    """Calls `write` with a temporary path of the same suffix, then renames that file to `path`.

    Raises:
        MTPError: if the file cannot be written.
    """
    with clear_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        # Two threads of a process may write the same file at once, such as a cached one.
        temporary = path.with_name(f".{path.stem}.{os.getpid()}.{threading.get_ident()}{path.suffix}")
        try:
            write(temporary)
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Waits until no other process or thread is in such a block for the same `path`, which need not exist.

    The lock is on a hidden file beside it, which stays: `path` itself may be replaced meanwhile.

    Raises:
        MTPError: if that file cannot be made.
    """
    with clear_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = open(path.with_name(f".{path.name}.{_LOCK}"), "a")
    with lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # until it is closed, or the process ends
        yield


def write_text(path: Path, text: str) -> None:
    """Writes a text file whole or not at all."""
    write_file(path, lambda temporary: _write_and_sync(temporary, text))


def _write_and_sync(path: Path, text: str) -> None:
    with open(path, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A temporary folder that becomes `path`, replacing what is there, if the block does not fail.

    It is made in a workshop beside `path`, a hidden folder that also holds the old `path` between the two renames. An
    error or Ctrl-C puts the old one back. What a killed process left is tidied up by the next one (`tidy_up`).

    Raises:
        MTPError: if it cannot be written.
    """
    missing = [folder for folder in path.parents if not folder.exists()]  # innermost first
    with clear_errors(path):
        tidy_up(path)
        workshop = path.with_name(f".{path.name}.{secrets.token_hex(4)}{_WORKSHOP}")
        try:
            workshop.mkdir(0o700, parents=True)
            with open(workshop / _LOCK, "w") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)  # until the process ends, whatever ends it
                new = workshop / "new"
                new.mkdir()
                yield new
                if path.exists():
                    os.replace(path, workshop / "old")
                os.replace(new, path)
        finally:
            _clear(workshop, path)
            for folder in missing:
                with suppress(OSError):
                    folder.rmdir()  # fails, rightly, if something is in it


def tidy_up(path: Path) -> None:
    """Clears away what a killed process left beside `path`; what it was replacing at that moment is put back."""
    with suppress(OSError):  # a folder that cannot be listed or locked is left to whoever can
        for workshop in path.parent.glob(f".{glob.escape(path.name)}.*{_WORKSHOP}"):
            with open(workshop / _LOCK, "a") as lock:
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    continue  # its process is still at work
                _clear(workshop, path)


def _clear(workshop: Path, path: Path) -> None:
    """Removes a workshop. If `path` was moved into it and nothing has taken its place, it is put back first."""
    if (workshop / "new").exists() and (workshop / "old").exists() and not path.exists():
        os.replace(workshop / "old", path)
    shutil.rmtree(workshop, ignore_errors=True)


def cache_dir() -> Path:
    """The folder of converted models and measurements: $MTP_MLX_CACHE, or ~/.cache/mtp-mlx.

    Raises:
        MTPError: if there is no home folder, as for a user who is not in the system's list of users, or the variable
            names the home folder of a user who does not exist.
    """
    named = os.environ.get("MTP_MLX_CACHE")
    if named:
        try:
            return user_path(named)
        except MTPError as error:
            raise MTPError(f"MTP_MLX_CACHE names {error}") from None
    try:
        return Path.home() / ".cache" / "mtp-mlx"
    except RuntimeError:
        raise MTPError("there is no home folder: set MTP_MLX_CACHE to a folder that can be written") from None


def kept_file(*names: str) -> Path | None:
    """The file of that name in the cache, or None if there is no place for a cache (see `cache_dir`)."""
    try:
        return cache_dir().joinpath(*names)
    except MTPError:
        return None


def keep_if_possible(write: Callable[[], object], what: str) -> bool:
    """Keeps something in the cache for later runs; if that fails, warns once of every kind of thing and goes on.

    Args:
        write: writes it, and may raise MTPError or OSError.
        what: what it is, in the plural.

    Returns:
        Whether it was written.
    """
    try:
        write()
    except (MTPError, OSError) as error:
        said = _warned or "MTP_MLX_CACHE" in str(error)
        how = "" if said else "; set MTP_MLX_CACHE to a folder that can be written"
        warn_once(what, f"{what} are not kept for later runs ({error}){how}")
        return False
    return True


def warn_once(what: str, sentence: str) -> None:
    """Logs a warning about `what`, once per process."""
    if what not in _warned:
        _warned[what] = sentence
        log.warning("%s", sentence)


def check_out(out: Path, *, force: bool, mark: str, kind: str, source: str | Path) -> None:
    """Refuses to write a conversion to `out` where it would replace something that it must not.

    Args:
        force: replace a folder of the same kind.
        mark: the file that such a folder has.
        kind: what such a folder is called, with its article.
        source: what is converted.

    Raises:
        MTPError: if `out` exists without `force`, is something else, or holds `source`.
    """
    tidy_up(out)
    if out.exists() and not force:
        raise MTPError(f"{out} exists already: choose another folder, or replace it with `force`.")
    if out.exists() and not (out / mark).exists() and (not out.is_dir() or any(out.iterdir())):
        raise MTPError(f"{out} is not {kind}, so `force` will not replace it: choose another folder.")
    check_source_stays(out, source)


def check_source_stays(out: Path, source: str | Path) -> None:
    """Raises MTPError where replacing `out` would delete `source`."""
    place = Path(source).resolve()
    if out.exists() and out.resolve() in (place, *place.parents):
        raise MTPError(
            f"{out} holds the source {source} itself, which `force` would delete: choose another folder."
        )
