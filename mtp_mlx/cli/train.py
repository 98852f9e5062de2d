"""`mtp-mlx train`: trains an adapter, resumes a run that was stopped, shows progress on stderr."""

from __future__ import annotations

import json
import os
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

from mtp_mlx.cli.train_options import METHODS, OF_SOME_METHODS, EverySetting, readers, settings_from
from mtp_mlx.config import options_for
from mtp_mlx.drafters.registry import method_class, trains
from mtp_mlx.errors import MTPError
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
  mlx.launch -n 2 -- mtp-mlx train --data answers.jsonl --out adapter
"""
ROWS = """Rows of DATA have "messages", "prompt" with "completion", or "text". The checkpoint and the metrics are
written beside OUT; the same command resumes a run that was stopped."""


class MethodGroup(click.Group):
    """`mtp-mlx train`: a command for each method, and the options of all methods for those who name none."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """The methods, then the options that all of them have."""
        with formatter.section("Methods"):
            formatter.write_dl([(name, trains(name).help) for name in METHODS])
        _write_options(formatter, "Options of all methods", self.get_params(ctx), ctx)


class MethodCommand(click.Command):
    """`mtp-mlx train METHOD`."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Names the methods that read an option of theirs that this one does not."""
        try:
            return super().parse_args(ctx, args)
        except click.NoSuchOption as error:
            name = error.option_name.removeprefix("--").removeprefix("no-").replace("-", "_")
            if name not in OF_SOME_METHODS:
                raise
            raise MTPError(f"`{name}` is a setting of {readers(name)}, not of {self.name}") from error

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """The method's own options, then those that all methods have."""
        parameters = self.get_params(ctx)
        own = [one for one in parameters if one.name in OF_SOME_METHODS]
        common = [one for one in parameters if one not in own]
        _write_options(formatter, f"Options of {self.name}", own, ctx)
        _write_options(formatter, "Options of all methods", common, ctx)


def _write_options(
    formatter: click.HelpFormatter, title: str, parameters: list[click.Parameter], context: click.Context
) -> None:
    records = [parameter.get_help_record(context) for parameter in parameters]
    with formatter.section(title):
        formatter.write_dl([record for record in records if record is not None])


def _run_options(command: Any) -> Any:
    """Options that are not settings."""
    command = click.option("--json", "as_json", is_flag=True, help="Print a JSON summary to stdout")(command)
    path = click.Path(path_type=Path)
    return click.option("--config", type=path, help="Read settings from this YAML file")(command)


@click.group(
    cls=MethodGroup,
    epilog=EPILOG,
    short_help="Train an adapter on your own data",
    help="Train an adapter that drafts for a base model; the base model stays as it is.\n\n"
    f"METHOD is one of those below; the default is {METHODS[0]}. {ROWS}",
    invoke_without_command=True,
    subcommand_metavar="[METHOD [OPTIONS]]",
)
@options_for(EverySetting)
@_run_options
@click.pass_context
def command(context: click.Context, **options: Any) -> None:
    """Trains by the method that `--method` or the YAML file names, or by the default one."""
    if context.invoked_subcommand is None:
        _train(context, options)


def _method_command(name: str) -> click.Command:
    """`mtp-mlx train NAME`; options given before NAME count as well."""
    method = trains(name)

    @click.command(
        name,
        cls=MethodCommand,
        help=f"{method.help}.\n\n{ROWS}",
        epilog="\b\nExamples:\n" + "".join(f"  {line}\n" for line in method.examples),
    )
    @options_for(method.settings)
    @_run_options
    @click.pass_context
    def train_method(context: click.Context, **options: Any) -> None:
        assert context.parent is not None
        before = context.parent.params
        options["as_json"] |= before["as_json"]
        given = {key: value for key, value in options.items() if value is not None and value != ()}
        _train(context, {**before, **given}, name)

    return train_method


for _name in METHODS:
    command.add_command(_method_command(_name))
for _option in command.params:  # options of single methods are shown by their commands
    if isinstance(_option, click.Option):
        _option.hidden = _option.name in OF_SOME_METHODS


def _train(context: click.Context, options: dict[str, Any], method: str | None = None) -> None:
    """Trains, prints the summary, and exits with 130 after Ctrl-C."""
    from mtp_mlx.distributed import join

    config, as_json = options.pop("config"), options.pop("as_json")
    settings = settings_from(config, options, method)
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
    """Loads model and data, trains with a progress bar on `console`, and returns a summary."""
    started = time.monotonic()
    with ProgressListener(console) as listener:
        trainer = prepare(settings, listener, peers)
        resumed = trainer.resume()
        first = trainer.step
        if resumed:
            listener.on_message(f"resuming after step {first} from {trainer.checkpoint_path}")
        listener.start(first, settings.steps)
        finished = trainer.run(listener.end_process)
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
    """The trainer of these settings; tells the listener about the data and the memory that the run may need."""
    from mtp_mlx.base_model import load_base, local_folder
    from mtp_mlx.model.seams import embedding_rows
    from mtp_mlx.train.data import load_splits
    from mtp_mlx.train.memory import check_weights, memory_budget
    from mtp_mlx.train.trainer import Trainer, check_out

    check_out(settings.out)  # before the model is loaded, which takes a while
    check_weights(local_folder(settings.model), memory_budget(settings.memory))
    model, tokenizer = load_base(settings.model, trust_remote_code=settings.trust_remote_code)
    data = load_splits(
        settings.data,
        tokenizer,
        settings.max_length,
        held_out=settings.held_out,
        seed=settings.seed,
        cut_at_tokens=settings.cut_at_tokens or None,
        vocab_size=embedding_rows(model),
    )
    listener.on_message(f"data: {data.report}; {len(data.held_out)} held out")
    method = method_class(settings.method)
    trainer = Trainer(method, model, data.train, data.held_out, settings, listener, peers)
    listener.on_message(f"steps: {trainer.plan}")
    listener.on_message(str(trainer.estimate))
    return trainer


class ProgressListener:
    """Draws the progress of a run: a bar with loss, rows per second and time left, and a line per measurement."""

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
        """Shows the bar, at step `done` of `total`."""
        self._bar.reset(self._task, total=total, completed=done)
        self._bar.start()

    def on_step(self, report: StepReport, total: int) -> None:
        """Advances the bar."""
        speed = report.rows / max(report.seconds, 1e-9)
        state = f"loss {report.loss:.3f}  {speed:.0f} rows/s"
        self._bar.update(self._task, completed=report.step, total=total, state=state)

    def on_measurement(self, step: int, agreement: Agreement) -> None:
        """Prints the measurement above the bar."""
        depths = " ".join(f"{value:.2f}" for value in agreement.acceptance)
        self.on_message(
            f"step {step}: acceptance by depth {depths}, {agreement.tokens_per_step:.2f} tokens per step "
            f"({agreement.blocks} held-out blocks)"
        )

    def on_message(self, message: str) -> None:
        """Prints a line above the bar."""
        self._console.print(message, highlight=False, soft_wrap=True, markup=False)

    def end_process(self) -> None:
        """Ends the process at once, with the cursor that the bar hides."""
        self._console.show_cursor()
        click.echo("\nStopped without saving this step.", err=True)
        os._exit(130)


def summary_line(summary: dict[str, Any]) -> str:
    """The last line on stderr."""
    text = f"{summary['steps']} steps"
    if summary["loss"] is not None:
        text += f", loss {summary['loss']:.3f}"
    if summary["tokens_per_step"] is not None:
        text += f", {summary['tokens_per_step']:.2f} tokens per step held out"
    text += f" -> {summary['out']}"
    return text + (". Stopped: the same command resumes from here." if summary["interrupted"] else "")
