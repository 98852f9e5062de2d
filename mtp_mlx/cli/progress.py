"""How far something long is, on stderr."""

from __future__ import annotations

import sys
import time

import click

from mtp_mlx.distributed import launched_rank

QUIET_SECONDS = 2.0  # a shorter prefill is not worth a line
QUIET_COST_SECONDS = 0.5  # nor is so short a measurement
SECONDS_BETWEEN = 10.0  # where lines stay, as in a file


def prompt_progress() -> ProgressLine:
    """For `prompt_progress_callback`."""
    return ProgressLine("reading the prompt: {done:,} of {total:,} tokens", QUIET_SECONDS)


def cost_progress() -> ProgressLine:
    """For measuring what a step costs, which takes a few seconds: hardly worth a line that stays."""
    quiet = QUIET_COST_SECONDS if sys.stderr.isatty() else SECONDS_BETWEEN
    return ProgressLine("measuring: {done} of {total} sizes of a step", quiet)


class ProgressLine:
    """Called with what is done and what there is in all; writes a line that replaces itself in a terminal.

    Args:
        text: the line, with {done} and {total}.
        quiet: seconds after which the first line is written.
    """

    def __init__(self, text: str, quiet: float) -> None:
        self._text, self._quiet = text, quiet
        self._in_terminal = sys.stderr.isatty()
        self._began = time.monotonic()
        self._said: float | None = None
        self._line_open = False

    def __call__(self, done: int, total: int) -> None:
        """Say how far it is, if it is time to."""
        now = time.monotonic()
        if launched_rank() != 0:
            return
        if done >= total:
            if self._line_open:
                click.echo("\r\033[K", nl=False, err=True)
            return
        pause = 0.0 if self._in_terminal else SECONDS_BETWEEN
        if now - self._began < self._quiet or (self._said is not None and now - self._said < pause):
            return
        self._said, self._line_open = now, self._in_terminal
        text = self._text.format(done=done, total=total)
        click.echo(f"\r\033[K{text}" if self._in_terminal else text, nl=not self._in_terminal, err=True)
