"""The command line: one click group whose verbs live in `mtp_mlx/cli/<verb>.py`, each as `command`.

A verb's module is imported only when it runs or shows its own help, and mlx only by the verbs, so that
`--help` is instant. What a person can mend becomes one sentence on stderr and exit code 2; MTP_MLX_RAISE=1
shows the traceback.
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

# Verb -> its line in `mtp-mlx --help`; written here so that the list needs no verb's module.
VERBS = {
    "generate": "Write text, several tokens per forward pass",
    "chat": "Talk with a model, answer by answer",
    "serve": "Answer requests of OpenAI's and Anthropic's clients",
    "train": "Train an adapter on your own data",
    "distill": "Write the base model's own answers to prompts",
    "convert": "Convert a checkpoint to an mlx-lm model folder",
    "info": "Show what a model, an adapter and this machine are",
    "doctor": "Show versions, device and kernels, for bug reports",
    "bench": "Compare the speed and text with plain mlx-lm",
    "eval": "Measure acceptance, speed and answers by category",
    "tune": "Find the fastest layout on this machine, for auto",
    "plan": "Project the speed-up on another machine's costs",
    "push": "Publish an adapter folder on the model hub",
    "pull": "Get an adapter folder from the model hub",
}
SHARING_VERBS = ("train", "generate")  # several processes of mlx.launch share one such command's work
_MENDABLE_OS_ERRORS = (
    FileNotFoundError,
    PermissionError,
    IsADirectoryError,
    NotADirectoryError,
    FileExistsError,
)


# Without a class of their own: names, and file systems that are read-only or hold no large files.
_MENDABLE_NUMBERS = (errno.ENAMETOOLONG, errno.ELOOP, errno.EROFS, errno.EFBIG)


class LazyGroup(click.Group):
    """A group that imports a verb's module when the verb is asked for."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """The verbs whose modules are there."""
        return [verb for verb in VERBS if importlib.util.find_spec(f"{__name__}.{verb}")]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """The verb's command, or None for an unknown verb."""
        if cmd_name not in self.list_commands(ctx):
            return None
        return importlib.import_module(f"{__name__}.{cmd_name}").command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """The list of verbs, without importing any of them."""
        rows = [(verb, VERBS[verb]) for verb in self.list_commands(ctx)]
        if rows:
            with formatter.section("Commands"):
                formatter.write_dl(rows)

    def invoke(self, ctx: click.Context) -> Any:
        """Run the verb; turn what a person can mend into one sentence and exit code 2."""
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


def explain(error: Exception) -> str | None:
    """One sentence for an error a person can mend, None for any other."""
    if isinstance(error, MTPError):
        return str(error)
    if isinstance(error, RuntimeError) and "Unable to write" in str(error):  # mlx saving tensors
        return "the weights could not be written, most likely because the disk is full."
    if isinstance(error, RuntimeError) and "home directory" in str(error):  # pathlib, of "~nobody"
        return 'a path begins with "~" and a name, and there is no such home folder: give the whole path.'
    if not isinstance(error, OSError):
        return None
    where = f"{error.filename}: " if error.filename else ""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"{where}the disk is full; free some space and run the command again."
    if isinstance(error, _MENDABLE_OS_ERRORS) or error.errno in _MENDABLE_NUMBERS:
        return f"{where or 'a file could not be written: '}{(error.strerror or str(error)).lower()}."
    return None


# Arguments of the library whose option has another name.
_OPTION_OF = {"temperature": "--temp", "emission": "--emit"}
_ARGUMENT = re.compile(r"`([a-z][a-z0-9_]*)`")


def with_options(message: str, command: click.Command | None) -> str:
    """A library's message in the words of the command line: `kv_bits` becomes --kv-bits.

    Only what the verb has as an option is translated; anything else between backticks stays as it is.
    """
    options = set(_options(command))

    def option(found: re.Match[str]) -> str:
        names = (f"--{found[1].replace('_', '-')}", _OPTION_OF.get(found[1], ""))
        return next((name for name in names if name in options), found[0])

    return _ARGUMENT.sub(option, message)


def _options(command: click.Command | None) -> Iterator[str]:
    """Every option of a verb and of its own verbs."""
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
