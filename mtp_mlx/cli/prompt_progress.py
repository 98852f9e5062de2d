"""How far a long prompt is, on stderr."""

from __future__ import annotations

import sys
import time

import click

from mtp_mlx.distributed import launched_rank

QUIET_SECONDS = 2.0  # a shorter prefill is not worth a line
SECONDS_BETWEEN = 10.0  # where lines stay, as in a file


class PromptProgress:
    """Called with the prompt tokens done and in all; writes a line that replaces itself in a terminal."""

    def __init__(self) -> None:
        self._began = time.monotonic()
        self._in_terminal = sys.stderr.isatty()
        self._said = self._began + QUIET_SECONDS - SECONDS_BETWEEN
        self._line_open = False

    def __call__(self, done: int, total: int) -> None:
        """Say how far the prompt is, if it is time to."""
        now = time.monotonic()
        if launched_rank() != 0:
            return
        if done >= total:
            if self._line_open:
                click.echo("\r\033[K", nl=False, err=True)
            return
        pause = 0.0 if self._in_terminal else SECONDS_BETWEEN
        if now - self._began < QUIET_SECONDS or now - self._said < pause:
            return
        self._said, self._line_open = now, self._in_terminal
        text = f"reading the prompt: {done:,} of {total:,} tokens"
        click.echo(f"\r\033[K{text}" if self._in_terminal else text, nl=not self._in_terminal, err=True)
