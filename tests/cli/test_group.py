"""Proves that each verb has help, --help loads no mlx, and a mendable error is one sentence and code 2."""

from __future__ import annotations

import errno
import importlib.util
import subprocess
import sys
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

import mtp_mlx.cli as cli
from mtp_mlx.errors import ModelNotFound, MTPError

EXISTING = [verb for verb in cli.VERBS if importlib.util.find_spec(f"mtp_mlx.cli.{verb}")]


def run(*args: str) -> click.testing.Result:
    """Run the command line in this process."""
    return CliRunner().invoke(cli.main, list(args))


def test_help_lists_the_verbs() -> None:
    result = run("--help")
    assert result.exit_code == 0
    for verb in EXISTING:
        assert cli.VERBS[verb] in result.output


@pytest.mark.parametrize("verb", EXISTING)
def test_every_verb_has_help(verb: str) -> None:
    result = run(verb, "--help")
    assert result.exit_code == 0, result.output
    assert result.output.startswith(f"Usage: main {verb}")


def test_help_texts_are_short() -> None:
    assert all(len(text) <= 60 and not text.endswith(".") for text in cli.VERBS.values())


def test_help_loads_no_mlx() -> None:
    code = (
        "import sys; from click.testing import CliRunner; import mtp_mlx.cli as cli\n"
        "assert CliRunner().invoke(cli.main, ['--help']).exit_code == 0\n"
        "heavy = ('mlx', 'mlx_lm', 'transformers', 'numpy')\n"
        "print([name for name in sys.modules if name.split('.')[0] in heavy])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_version_and_unknown_verb() -> None:
    assert run("--version").output.startswith("mtp-mlx, version ")
    result = run("fly")
    assert result.exit_code == 2 and "No such command 'fly'" in result.output


ERRORS: list[tuple[BaseException, int, str]] = [
    (MTPError("the model is odd; mend it."), 2, "Error: the model is odd; mend it.\n"),
    (ModelNotFound("no model 'x'."), 2, "Error: no model 'x'.\n"),
    (
        FileNotFoundError(errno.ENOENT, "No such file or directory", "a.txt"),
        2,
        "Error: a.txt: no such file or",
    ),
    (PermissionError(errno.EACCES, "Permission denied", "b"), 2, "Error: b: permission denied.\n"),
    (OSError(errno.ENOSPC, "No space left on device", "c"), 2, "Error: c: the disk is full"),
    (RuntimeError("[write] Unable to write 9 bytes to file."), 2, "Error: the weights could not be written"),
    (KeyboardInterrupt(), 130, "Stopped.\n"),
]


@pytest.mark.parametrize(("error", "code", "message"), ERRORS, ids=lambda value: type(value).__name__)
def test_errors_are_one_sentence(
    monkeypatch: pytest.MonkeyPatch, error: BaseException, code: int, message: str
) -> None:
    @click.command()
    def failing() -> None:
        raise error

    monkeypatch.delenv("MTP_MLX_RAISE", raising=False)
    monkeypatch.setattr(cli.LazyGroup, "get_command", lambda *_: failing)
    result = run("generate")
    assert (result.exit_code, result.stdout) == (code, "")
    assert result.stderr.removeprefix(cli.HOW_TO_MEND + "\n").lstrip().startswith(message)
    assert len(result.stderr.strip().splitlines()) <= 2
    monkeypatch.setenv("MTP_MLX_RAISE", "1")
    if not isinstance(error, KeyboardInterrupt):
        assert run("generate").exception is error


BUGS = [RuntimeError("a bug"), ValueError("a bug"), OSError(errno.EIO, "I/O error")]


@pytest.mark.parametrize("error", BUGS)
def test_bugs_keep_their_traceback(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    @click.command()
    def failing() -> None:
        raise error

    monkeypatch.setattr(cli.LazyGroup, "get_command", lambda *_: failing)
    result = run("generate")
    assert result.exception is error and result.exit_code == 1


def test_a_missing_verb_breaks_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(cli.VERBS, "dance", "Dance on the table")
    assert "dance" not in run("--help").output
    assert run("dance").exit_code == 2
    assert run("convert", "--help").exit_code == 0


def test_convert_refuses_what_is_no_gguf(tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("convert")
    (folder / "notes.txt").write_text("x")
    (folder / "bad.gguf").write_text("x")
    cases = {"none.gguf": "no such file", "notes.txt": "files ending in .gguf", "bad.gguf": "not a GGUF file"}
    for name, message in cases.items():
        result = run("convert", str(folder / name), str(folder / "out"))
        assert result.exit_code == 2 and message in result.stderr, result.output
    assert not (folder / "out").exists()


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="OpenBLAS is preloaded on Linux only")
def test_openblas_is_preferred_only_before_mlx() -> None:
    code = (
        "from mtp_mlx.blas import prefer_openblas\n"
        "print(prefer_openblas())\nimport mlx.core\nprint(prefer_openblas())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    first, second = done.stdout.split()
    assert first in ("loaded", "missing") and second == "late"


def test_names_that_no_file_can_have() -> None:
    assert cli.explain(OSError(errno.ENAMETOOLONG, "File name too long", "xx")) == "xx: file name too long."
    assert cli.explain(OSError(errno.EIO, "Input/output error", "xx")) is None
    assert cli.explain(OSError(errno.EROFS, "Read-only file system", "xx")) == "xx: read-only file system."
    assert (
        cli.explain(OSError(errno.EFBIG, "File too large")) == "a file could not be written: file too large."
    )
    assert "without a home folder" in str(cli.explain(RuntimeError("Could not determine home directory.")))
    assert cli.explain(RuntimeError("something else")) is None


def test_a_deleted_working_directory_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gone = FileNotFoundError(errno.ENOENT, "No such file or directory")
    assert cli.explain(gone) == "a file could not be used: no such file or directory."
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    (tmp_path / "here").rmdir()
    for args in (("info", "model"), ("generate", "-m", "model", "-p", "a"), ("plan", "-a", "adapter")):
        result = run(*args)
        assert result.exit_code == 2 and "could not be written" not in result.stderr, result.stderr
    assert "working directory was deleted" in str(cli.explain(gone))


def test_other_libraries_messages_keep_their_capitals() -> None:
    error = FileNotFoundError("Cannot find a snapshot. Set HF_HUB_OFFLINE=0.")
    assert cli.explain(error) == "a file could not be used: Cannot find a snapshot. Set HF_HUB_OFFLINE=0."


def test_arguments_of_the_library_are_options_of_the_verb() -> None:
    """A library says `kv_bits`, the command line --kv-bits; what the verb has no option for stays as it is."""
    generate = cli.main.get_command(click.Context(cli.main), "generate")
    message = "leave `kv_bits` out, or give `temperature` 0; `mtp-mlx tune` and `no_such_argument` stay"
    expected = "leave --kv-bits out, or give --temp 0; `mtp-mlx tune` and `no_such_argument` stay"
    assert cli.with_options(message, generate) == expected
    assert cli.with_options(message, None) == message
