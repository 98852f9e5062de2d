"""`mtp-mlx distill`: writes the base model's own answers to prompts, as training data."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TextColumn,
    TimeRemainingColumn,
)

from mtp_mlx.config import from_yaml, options_for
from mtp_mlx.train.distill import DistillSettings, DistillSummary, distill

EPILOG = """\b
Examples:
  mtp-mlx distill --prompts prompts.jsonl --out answers.jsonl
  mtp-mlx distill -m ./model -p prompts.jsonl -o answers.jsonl --temp 0.7 --limit 500
  mtp-mlx train --data answers.jsonl --out adapter
"""


@click.command(epilog=EPILOG, short_help="Write the base model's own answers to prompts")
@options_for(DistillSettings)
@click.option("--config", type=click.Path(path_type=Path), help="Read settings from this YAML file")
@click.option("--json", "as_json", is_flag=True, help="Print a JSON summary to stdout")
@click.pass_context
def command(context: click.Context, config: Path | None, as_json: bool, **options: Any) -> None:
    """Let the base model answer prompts, and append its answers to a JSONL file.

    Rows of PROMPTS have "prompt", "messages" or "turns" (the first turn is used). Prompts that OUT has an answer to
    are skipped, so the same command resumes a run that was stopped. Answers cut off while the model thought are left
    out.
    """
    settings = from_yaml(DistillSettings, config, options)
    console = Console(stderr=True)
    summary = run(settings, console)
    if as_json:
        click.echo(json.dumps(summary.to_dict()))
    console.print(summary_line(summary), highlight=False, soft_wrap=True)
    if summary.interrupted:
        context.exit(130)


def run(settings: DistillSettings, console: Console) -> DistillSummary:
    """Loads the model and answers the prompts, with a progress bar on `console`."""
    from mtp_mlx.base_model import load_base

    model, tokenizer = load_base(settings.model, trust_remote_code=settings.trust_remote_code)
    columns: tuple[ProgressColumn, ...] = (
        TextColumn("answers"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[speed]}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("answers", total=None, speed="")
        tokens = 0

        def on_start(pending: int, summary: DistillSummary) -> None:
            if summary.note:
                console.print(summary.note, highlight=False, soft_wrap=True)
            progress.reset(task, total=pending)

        def on_tokens(count: int) -> None:
            nonlocal tokens
            tokens += count
            progress.update(task, speed=f"{tokens / max(progress.tasks[0].elapsed or 0, 1e-3):.0f} tok/s")

        return distill(
            model,
            tokenizer,
            settings,
            on_start=on_start,
            on_tokens=on_tokens,
            on_answer=lambda answer: progress.advance(task),
        )


def summary_line(summary: DistillSummary) -> str:
    """The line on stderr at the end."""
    speed = summary.to_dict()["tok_per_s"]
    text = f"{summary.written} answers, {summary.tokens} tokens, {speed:.1f} tok/s -> {summary.out}"
    if summary.written:
        text += f"; {summary.finished} were ended by the model"
    if summary.unended:
        text += f"; {summary.unended} were left out, whose thinking has no end: raise --max-tokens"
    if summary.skipped:
        text += f"; {summary.skipped} were answered before"
    if summary.duplicates:
        text += f"; {summary.duplicates} duplicate prompts were left out"
    if summary.interrupted:
        text += ". Stopped: the same command resumes from here."
    return text
