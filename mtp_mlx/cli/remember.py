"""`mtp-mlx remember`: makes a file of n-grams to draft from, or adds texts to it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from mtp_mlx.config import from_yaml, options_for
from mtp_mlx.drafters import registry

EPILOG = """\b
Examples:
  mtp-mlx remember answers.jsonl --out answers.mem
  mtp-mlx remember chat.jsonl notes.txt --out answers.mem --max-size 200MB
  mtp-mlx generate --memory answers.mem --prompt "Why is the sky blue?"
"""


@click.command(epilog=EPILOG, short_help="Remember texts, to draft from them")
@click.argument("data", nargs=-1, required=True, type=click.Path(path_type=Path))
@options_for(registry.remember_settings())
@click.option("--json", "as_json", is_flag=True, help="Print a JSON summary to stdout")
def command(data: tuple[Path, ...], as_json: bool, **options: Any) -> None:
    """Count which words follow which in DATA and add the counts to a file, for --memory of other commands.

    DATA are answers as distill writes them, chats (/save in chat, or rows with "messages"), or plain texts. Of
    answers and chats, only what the model wrote is counted. The file holds pieces of these texts: keep it as private
    as they are.
    """
    settings: Any = from_yaml(registry.remember_settings(), None, options)
    report = registry.remember(settings, data=data)
    if as_json:
        click.echo(json.dumps(report.to_dict()))
    for path in report.skipped:
        click.echo(f"note: {path} was remembered before and is left out", err=True)
    click.echo(
        f"{report.tokens:,} tokens in {report.seconds:.1f} s -> {report.out}: {report.entries:,} n-grams of "
        f"{report.tokens_in_all:,} tokens, {report.bytes / 1e6:.1f} MB",
        err=True,
    )
