"""`mtp-mlx eval --sweep-tau`: what unverified emission gains and what it costs, tau by tau."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from mtp_mlx.config import from_yaml, options_for, setting
from mtp_mlx.errors import MTPError

if TYPE_CHECKING:
    from mtp_mlx.eval.tau_sweep import Measured, TauRow

EPILOG = """\b
Examples:
  mtp-mlx eval --sweep-tau --adapter ./adapter
  mtp-mlx eval --sweep-tau --questions gsm8k.jsonl --limit 100 --out sweep.jsonl --svg sweep.svg
"""


@dataclass(frozen=True)
class EvalSettings:
    """Options of `mtp-mlx eval`."""

    model: str = setting("smollm2-135m", help="Embedded model, mlx-lm folder or hub id", flag="-m")
    adapter: str = setting("auto", help="Adapter folder, 'auto' or 'none'", flag="-a")
    questions: Path | None = setting(None, help="JSONL: question or prompt, optional answer", flag="-q")
    limit: int | None = setting(None, help="At most this many questions, spread over the file", minimum=1)
    tau: tuple[float, ...] = setting(
        (0.6, 0.7, 0.8, 0.85, 0.9, 0.95, 0.98, 0.99, 0.995), help="Threshold to measure, may be repeated"
    )
    slots: int | None = setting(None, help="Mask slots of a pass (default: all)", minimum=1)
    max_tokens: int = setting(128, help="Tokens per question", minimum=2, flag="-n")
    out: Path | None = setting(None, help="Keep every measurement here, to go on after a stop", flag="-o")
    svg: Path | None = setting(None, help="Draw the curve into this file")


@click.command(epilog=EPILOG, short_help="Measure what unverified emission gains and costs")
@options_for(EvalSettings)
@click.option("--sweep-tau", is_flag=True, help="Measure ConfAdapt at every --tau against plain decoding")
@click.option("--raw", is_flag=True, help="Use questions as they are, without the chat template")
@click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout")
@click.pass_context
def command(context: click.Context, sweep_tau: bool, raw: bool, as_json: bool, **options: Any) -> None:
    """Measure tokens per pass of ConfAdapt against agreement with the model's own text.

    The built-in prompts have no answers; a file of --questions may have them, as GSM8K's does. With --out the same
    command goes on after a stop.
    """
    if not sweep_tau:
        raise click.UsageError("nothing to measure: give --sweep-tau.")
    settings = from_yaml(EvalSettings, None, options)
    rows, whole = sweep(settings, raw, Console(stderr=True))
    if settings.svg is not None and rows:
        from mtp_mlx.eval.plot import svg
        from mtp_mlx.files import write_text

        write_text(settings.svg, svg(rows, f"ConfAdapt, {settings.model}"))
    if as_json:
        report = {"model": settings.model, "adapter": settings.adapter, "max_tokens": settings.max_tokens}
        click.echo(json.dumps({**report, "finished": whole, "rows": [row.to_json() for row in rows]}))
    elif rows:
        Console().print(table(rows))
    if not whole:
        more = "; the same command goes on from here" if settings.out else ""
        click.echo(f"Stopped before the end{more}.", err=True)
        context.exit(130)


def sweep(settings: EvalSettings, raw: bool, console: Console) -> tuple[list[TauRow], bool]:
    """The rows of what was measured, and whether that is all."""
    from mtp_mlx.api import load
    from mtp_mlx.eval.questions import read_questions
    from mtp_mlx.eval.tau_sweep import SweepSettings, TauSweep, summarise
    from mtp_mlx.model.mask_adapter import MaskAdapter

    questions = read_questions(settings.questions, settings.limit)
    model, tokenizer = load(settings.model, None if settings.adapter == "none" else settings.adapter)
    if not isinstance(model.adapter, MaskAdapter):
        raise MTPError("a sweep of tau needs mask tokens: give an adapter that has them with --adapter")
    measured: list[Measured] = []
    plan = SweepSettings(tuple(dict.fromkeys(settings.tau)), settings.max_tokens, settings.slots, raw)
    name = f"{settings.model} {settings.adapter} {model.info.base_fingerprint}"
    sweep = TauSweep(model, tokenizer, questions, plan, settings.out, name)
    with Progress(console=console) as progress:
        task = progress.add_task("measuring", total=sweep.total)

        def on_measured(row: Measured) -> None:
            measured.append(row)
            progress.advance(task)

        try:
            sweep.run(on_measured)
        except KeyboardInterrupt:
            return summarise(measured), False
    return summarise(measured), True


def table(rows: list[TauRow]) -> Table:
    """The rows as a rich table."""
    out = Table(title="ConfAdapt against the model's own path; every row with a tau is lossy")
    for name in ("tau", "questions", "tok/pass", "agreement", "nll/token", "same text", "right"):
        out.add_column(name, justify="right")
    for row in rows:
        out.add_row(
            "plain" if row.tau is None else f"{row.tau:g}",
            str(row.questions),
            f"{row.tokens_per_pass:.2f}",
            f"{100 * row.agreement:.1f} %",
            f"{row.nll:.3f}",
            f"{100 * row.same:.0f} %",
            "-" if row.right is None else f"{100 * row.right:.1f} %",
        )
    return out
