"""`mtp-mlx train`: trains an adapter, resumes by itself, shows progress on stderr."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

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
from mtp_mlx.train.settings import TrainSettings

if TYPE_CHECKING:
    from mtp_mlx.distributed import Peers
    from mtp_mlx.train.agreement import Agreement
    from mtp_mlx.train.trainer import StepReport, Trainer

EPILOG = """\b
Examples:
  mtp-mlx distill --prompts prompts.jsonl --out answers.jsonl
  mtp-mlx train --data answers.jsonl --out adapter
  mtp-mlx train --config train.yaml --steps 2000
  mtp-mlx train --data answers.jsonl --out heads --method mtp-heads --hidden-cache states
  mtp-mlx train --data answers.jsonl --out heads8 --method mtp-heads --start-from heads --extend 2x
  mlx.launch -n 2 -- mtp-mlx train --data answers.jsonl --out adapter
"""


@click.command(epilog=EPILOG, short_help="Train an adapter on your own data")
@options_for(TrainSettings)
@click.option("--config", type=click.Path(path_type=Path), help="Read settings from this YAML file")
@click.option("--json", "as_json", is_flag=True, help="Print a JSON summary to stdout")
@click.pass_context
def command(context: click.Context, config: Path | None, as_json: bool, **options: Any) -> None:
    """Train a mask-token adapter or MTP heads for a base model whose weights stay as they are.

    Rows of DATA have "messages", "prompt" with "completion", or "text". Checkpoint and metrics lie beside
    OUT; after a stop the same command goes on from there, with the losses of a run that never stopped.
    """
    from mtp_mlx.distributed import join

    settings = from_yaml(TrainSettings, config, options)
    peers = join()
    console = Console(stderr=True, quiet=not peers.leads)
    summary = run(settings, console, peers)
    if as_json and peers.leads:
        click.echo(json.dumps(summary))
    console.print(summary_line(summary), highlight=False, soft_wrap=True)
    peers.gather("done")  # mlx.launch ends the others as soon as one of them exits with an error
    if summary["interrupted"]:
        context.exit(130)


def run(settings: TrainSettings, console: Console, peers: Peers | None = None) -> dict[str, Any]:
    """Load model and data, train with a progress bar on `console`, and say what was done."""
    started = time.monotonic()
    with ProgressListener(console) as listener:
        trainer = prepare(settings, listener, peers)
        resumed = trainer.resume()
        first = trainer.step
        if resumed:
            listener.on_message(f"going on after step {first} of {trainer.checkpoint_path}")
        listener.start(first, settings.steps)
        finished = trainer.run()
    measured = trainer.agreement
    return {
        "out": str(settings.out),
        "steps": trainer.step,
        "resumed_from": first if resumed else None,
        "loss": trainer.loss,
        "acceptance": measured.acceptance if measured else None,
        "tokens_per_step": measured.tokens_per_step if measured else None,
        "seconds": round(time.monotonic() - started, 1),
        "interrupted": not finished,
    }


def prepare(settings: TrainSettings, listener: ProgressListener, peers: Peers | None = None) -> Trainer:
    """The trainer of these settings; says what the data are and what memory the run may need."""
    # What is cheap to refuse is refused before the model is loaded.
    from mtp_mlx.models import resolve_model
    from mtp_mlx.train.data import load_splits
    from mtp_mlx.train.memory import too_much
    from mtp_mlx.train.trainer import Trainer, check_out

    check_out(settings.out)
    folder = resolve_model(settings.model)
    from mlx_lm import load

    model, tokenizer = load(str(folder))[:2]
    data = load_splits(
        settings.data,
        tokenizer,
        settings.max_length,
        held_out=settings.held_out,
        seed=settings.seed,
        cut_at_tokens=settings.cut_at_tokens or None,
    )
    listener.on_message(f"data: {data.report}; {len(data.held_out)} held out")
    trainer = Trainer(model, data.train, data.held_out, settings, listener, peers)
    estimate = trainer.method.estimate_memory(data.train)
    listener.on_message(str(estimate))
    warning = too_much(estimate, remedy=trainer.method.less_memory)
    if warning:
        listener.on_message(f"warning: {warning}")
    return trainer


class ProgressListener:
    """Draws a trainer's progress: a bar with loss, rows per second and time left, a line per measurement."""

    def __init__(self, console: Console) -> None:
        self._console = console
        columns: tuple[ProgressColumn, ...] = (
            TextColumn("steps"),
            BarColumn(bar_width=20),
            MofNCompleteColumn(),
            TextColumn("{task.fields[state]}"),
            TimeRemainingColumn(),
        )
        self._bar = Progress(*columns, console=console)
        self._task = self._bar.add_task("steps", total=None, state="")

    def __enter__(self) -> ProgressListener:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def start(self, done: int, total: int) -> None:
        """Shows the bar from step `done`."""
        self._bar.reset(self._task, total=total, completed=done)
        self._bar.start()

    def on_step(self, report: StepReport, total: int) -> None:
        """Moves the bar."""
        speed = report.rows / max(report.seconds, 1e-9)
        state = f"loss {report.loss:.3f}  {speed:.0f} rows/s"
        self._bar.update(self._task, completed=report.step, total=total, state=state)

    def on_measurement(self, step: int, agreement: Agreement) -> None:
        """A line that stays."""
        depths = " ".join(f"{value:.2f}" for value in agreement.acceptance)
        self.on_message(
            f"step {step}: acceptance by depth {depths}, {agreement.tokens_per_step:.2f} tokens per step "
            f"({agreement.blocks} held-out blocks)"
        )

    def on_message(self, message: str) -> None:
        """A line that stays."""
        self._console.print(message, highlight=False, soft_wrap=True, markup=False)


def summary_line(summary: dict[str, Any]) -> str:
    """The line on stderr at the end."""
    text = f"{summary['steps']} steps"
    if summary["loss"] is not None:
        text += f", loss {summary['loss']:.3f}"
    if summary["tokens_per_step"] is not None:
        text += f", {summary['tokens_per_step']:.2f} tokens per step held out"
    text += f" -> {summary['out']}"
    return text + (". Stopped: the same command goes on from here." if summary["interrupted"] else "")
