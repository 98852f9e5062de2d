"""The command line: a click group; each verb is the `command` of `mtp_mlx/cli/<verb>.py`.

A verb's module is imported only when the verb runs or shows its help, and mlx only when a verb runs, so that `--help`
is instant. An error that the user can fix becomes one sentence on stderr and exit code 2; MTP_MLX_RAISE=1 shows the
traceback instead.
"""

from __future__ import annotations

import errno
import importlib
import importlib.metadata
import importlib.util
import os
import re
import sys
from collections.abc import Iterator
from typing import Any

import click

from mtp_mlx.blas import HOW_TO_MEND, prefer_openblas
from mtp_mlx.distributed import refuse_if_many, whose
from mtp_mlx.errors import MTPError

# Verb -> its line in `mtp-mlx --help`; kept here so that listing the verbs imports none of their modules.
VERBS = {
    "generate": "Write text, several tokens per forward pass",
    "chat": "Chat with a model in the terminal",
    "serve": "Serve OpenAI- and Anthropic-compatible APIs over HTTP",
    "train": "Train an adapter on your own data",
    "distill": "Write the base model's own answers to prompts",
    "remember": "Remember texts, to draft from them",
    "cache-prompt": "Read a long text once, to ask about it later",
    "convert": "Convert a checkpoint to an mlx-lm model folder",
    "info": "Show what a model, an adapter and this machine are",
    "doctor": "Show versions, device and kernels, for bug reports",
    "bench": "Compare speed and text with plain mlx-lm",
    "eval": "Measure speed, acceptance and answers by category",
    "tune": "Find the fastest layout on this machine",
    "plan": "Project the speed-up on other machines",
    "push": "Publish an adapter folder on the model hub",
    "pull": "Get an adapter folder from the model hub",
}
SHARING_VERBS = ("train", "generate", "serve")  # processes started by mlx.launch share their work
_MENDABLE_OS_ERRORS = (
    FileNotFoundError,
    PermissionError,
    IsADirectoryError,
    NotADirectoryError,
    FileExistsError,
)
# Errors without a class of their own: impossible names, read-only file systems, files too large for the file system.
_MENDABLE_NUMBERS = (errno.ENAMETOOLONG, errno.ELOOP, errno.EROFS, errno.EFBIG)
# What fails without the name of a file.
_DOING = {number: "a file could not be written: " for number in (errno.EROFS, errno.EFBIG)}


class LazyGroup(click.Group):
    """A group that imports a verb's module only when the verb is used."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """The verbs whose modules exist."""
        return [verb for verb in VERBS if importlib.util.find_spec(_module_of(verb))]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """The verb's command, or None for an unknown verb."""
        if cmd_name not in self.list_commands(ctx):
            return None
        return importlib.import_module(_module_of(cmd_name)).command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """The list of verbs, without importing any of them."""
        rows = [(verb, VERBS[verb]) for verb in self.list_commands(ctx)]
        if rows:
            with formatter.section("Commands"):
                formatter.write_dl(rows)

    def invoke(self, ctx: click.Context) -> Any:
        """Run the verb; errors that the user can fix become one sentence and exit code 2."""
        try:
            return super().invoke(ctx)
        except (MTPError, OSError, RuntimeError) as error:
            message = explain(error)
            if message is None or os.environ.get("MTP_MLX_RAISE") == "1":
                raise
            message = with_options(message, self.get_command(ctx, str(ctx.invoked_subcommand)))
            click.echo(f"Error{whose()}: {message}", err=True)
            ctx.exit(2)
        except KeyboardInterrupt:
            if os.environ.get("MTP_MLX_RAISE") == "1":
                raise
            click.echo("Stopped.", err=True)
            ctx.exit(130)


def _module_of(verb: str) -> str:
    return f"{__name__}.{verb.replace('-', '_')}"


def explain(error: Exception) -> str | None:
    """One sentence for an error that the user can fix, None for any other."""
    if isinstance(error, MTPError):
        return str(error)
    if isinstance(error, RuntimeError) and "Unable to write" in str(error):  # from mlx, when it saves tensors
        return "the weights could not be written, probably because the disk is full."
    if isinstance(error, RuntimeError) and "home directory" in str(error):  # from pathlib, for "~nobody"
        return 'a path begins with "~" and the name of a user without a home folder: give the full path.'
    if not isinstance(error, OSError):
        return None
    if isinstance(error, FileNotFoundError) and not _has_working_directory():
        return "the working directory was deleted: change to another folder (cd) and run the command again."
    where = f"{error.filename}: " if error.filename else ""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"{where}the disk is full; free some space and run the command again."
    if isinstance(error, _MENDABLE_OS_ERRORS) or error.errno in _MENDABLE_NUMBERS:
        reason = error.strerror.lower() if error.strerror else str(error).rstrip(".")
        return f"{where or _DOING.get(error.errno or 0, 'a file could not be used: ')}{reason}."
    return None


def _has_working_directory() -> bool:
    try:
        os.getcwd()
    except OSError:
        return False
    return True


# Arguments of the library that have another name on the command line.
_OPTION_OF = {"temperature": "--temp", "emission": "--emit"}
_ARGUMENT = re.compile(r"`([a-z][a-z0-9_]*)`")


def with_options(message: str, command: click.Command | None) -> str:
    """Rewrites a library message for the command line: `kv_bits` becomes --kv-bits.

    Only names that are options of the verb are translated; anything else between backticks stays as it is.
    """
    options = set(_options(command))

    def option(found: re.Match[str]) -> str:
        names = (f"--{found[1].replace('_', '-')}", _OPTION_OF.get(found[1], ""))
        return next((name for name in names if name in options), found[0])

    return _ARGUMENT.sub(option, message)


def _options(command: click.Command | None) -> Iterator[str]:
    """Every option of a verb and of its subcommands."""
    if isinstance(command, click.Group):
        for inner in command.commands.values():
            yield from _options(inner)
    for parameter in [] if command is None else command.params:
        yield from parameter.opts


def _version() -> str:
    try:
        return importlib.metadata.version("mtp-mlx")
    except importlib.metadata.PackageNotFoundError:  # run from a checkout that is not installed
        return "unknown"


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(_version(), prog_name="mtp-mlx")
def main() -> None:
    """Make dense mlx-lm models write several tokens per forward pass."""
    if prefer_openblas() == "missing":
        print(HOW_TO_MEND, file=sys.stderr)
    verb = click.get_current_context().invoked_subcommand
    if verb not in SHARING_VERBS:
        refuse_if_many(str(verb))
