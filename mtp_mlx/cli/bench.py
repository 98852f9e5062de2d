"""`mtp-mlx bench`: compare mtp-mlx with plain mlx-lm on the same weights and prompts, in turns in one process."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click
from rich.console import Console
from rich.progress import Progress

from mtp_mlx.cli.options import DRAFTERS, LoadingOptions
from mtp_mlx.config import from_yaml, options_for, setting, trust_setting
from mtp_mlx.errors import MTPError

if TYPE_CHECKING:
    from mtp_mlx.measure.lanes import Bench, Lane, Measurement
    from mtp_mlx.measure.prompts import Prompt
    from mtp_mlx.model.attach import AttachedModel

EPILOG = """\b
Examples:
  mtp-mlx bench
  mtp-mlx bench --prompts prompts.jsonl --layout auto --layout quadratic --max-tokens 128
  mtp-mlx bench --layout linear --limit 4 --plot bench.svg
  mtp-mlx bench --layout plain --json
  mtp-mlx bench --explain
"""


@dataclass(frozen=True)
class BenchSettings(LoadingOptions):
    """Options of `mtp-mlx bench`."""

    model: str = setting("smollm2-135m", help="Embedded model, mlx-lm folder or hub id", flag="-m")
    adapter: str = setting("auto", help="Adapter folder or hub id, 'auto' or 'none'", flag="-a")
    heads: str | None = setting(None, help="MTP heads, or a Gemma 4 assistant: hub id, folder or file")
    adapter_path: str | None = setting(None, help="Fine-tune of mlx_lm.lora to put on the model")
    trust_remote_code: bool = trust_setting()
    prompts: Path | None = setting(None, help="JSONL file of prompts (default: built-in)", flag="-p")
    limit: int | None = setting(None, help="Use this many prompts, spread over the file", minimum=1)
    per_category: int | None = setting(None, help="Use this many prompts per category", minimum=1)
    layout: tuple[Literal["auto", "linear", "quadratic", "tree", "plain"], ...] = setting(
        (), help="Layout to measure; may be repeated (default: auto)"
    )
    rows: tuple[int, ...] = setting((), help="Rows of a step of layout tree; may be repeated", minimum=2)
    drafts: int | None = setting(
        None, help="Drafts per step in fixed layouts", minimum=1, old_option="--slots"
    )
    lookup: bool | None = setting(None, help="Also draft from the text so far (default: in auto and tree)")
    drafter: str | None = setting(None, help=DRAFTERS)
    emit: Literal["verified", "conf-adapt", "static"] = setting(
        "verified", help="Verify drafts, or emit them unverified (lossy)"
    )
    tau: tuple[float, ...] = setting((), help="Minimum probability of a draft; may be repeated")
    max_tokens: int = setting(128, help="Tokens per prompt", minimum=2, flag="-n")
    quantize: Literal[4, 8] | None = setting(None, help="Quantise the embedded model to this many bits")
    exact: bool = setting(False, help="Match plain decoding bit for bit (slower)")
    explain: bool = setting(False, help="Show what the planner of auto expected, and what came")
    plot: Path | None = setting(None, help="Plot speed and acceptance to this SVG file")


@click.command(epilog=EPILOG, short_help="Compare speed and text with plain mlx-lm")
@options_for(BenchSettings)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object")
def command(as_json: bool, **options: Any) -> None:
    """Measure speed and tokens per step by category, and check that the text is mlx-lm's.

    Rows of the prompts file have "prompt", "question" or "turns", and optionally "category". Ratios are ratios of
    totals: all tokens over all seconds, relative to mlx-lm in the same run. The mean of the per-prompt ratios follows
    in brackets where it differs.
    """
    settings = from_yaml(BenchSettings, None, options)
    from mtp_mlx.cli.loading import load_model
    from mtp_mlx.files import write_text
    from mtp_mlx.measure.explained import recorded, tables
    from mtp_mlx.measure.lanes import Bench
    from mtp_mlx.measure.prompts import read_prompts
    from mtp_mlx.measure.speed_plot import svg
    from mtp_mlx.measure.speed_report import earnings, summarise, table

    lanes = lanes_of(settings)
    chosen = read_prompts(settings.prompts, settings.limit, settings.per_category)
    model, tokenizer = load_model(settings)
    lanes = [_as_used(lane, model) for lane in lanes]
    bench = Bench(model, tokenizer, lanes, settings.max_tokens)
    with recorded() if settings.explain else nullcontext() as recording:
        done = _measure(bench, chosen, Console(stderr=True), recording.restart if recording else None)
        explanation = recording.explained() if recording else None
    rows = summarise(done)
    _remember_plain_speed(settings, [measurement for measurement in done if measurement.lane is lanes[0]])
    if settings.plot is not None:
        write_text(settings.plot, svg(rows, f"{settings.model}, mtp-mlx and plain mlx-lm"))
    mismatches = [_mismatch(measurement) for measurement in done if not measurement.comparison.identical]
    if as_json:
        report = {**_header(settings, model), "rows": [row.to_json() for row in rows]}
        planned = {} if explanation is None else {"planned": explanation.to_json()}
        click.echo(json.dumps({**report, "mismatches": mismatches, **planned}))
    else:
        further = [earnings(rows), *(tables(explanation) if explanation else ())]
        Console().print(table(rows), *(found for found in further if found is not None))
        for values in mismatches:
            click.echo(" ".join(f"{key}={value}" for key, value in values.items()))


def _remember_plain_speed(settings: BenchSettings, measured: Sequence[Measurement]) -> None:
    """Remember mlx-lm's speed, by the length of the prompts.

    Args:
        settings: which model.
        measured: one measurement of every prompt.
    """
    from mtp_mlx.cli.loading import speed_name
    from mtp_mlx.measure import plain_speed
    from mtp_mlx.measure.speed import rate

    by_length: dict[int, list[Measurement]] = {}
    for measurement in measured:
        by_length.setdefault(plain_speed.longer_than(measurement.prompt_tokens), []).append(measurement)
    for group in by_length.values():
        timed = [measurement.reference for measurement in group]
        tokens = sum(timing.timed_tokens for timing in timed)
        context = group[0].prompt_tokens
        plain_speed.remember(
            speed_name(settings), rate(timed), tokens, quantize=settings.quantize, context=context
        )


def lanes_of(settings: BenchSettings) -> list[Lane]:
    """A lane for every layout and emission.

    Raises:
        MTPError: if options contradict each other.
    """
    from mtp_mlx.decode.emission import Emission
    from mtp_mlx.measure.lanes import Lane

    if settings.lookup and settings.emit != "verified":
        raise MTPError("lookup drafts must be verified: leave --lookup out, or use --emit verified")
    if settings.rows and "tree" not in settings.layout:
        raise MTPError("--rows is for layout tree: add --layout tree, or leave --rows out")
    emissions = [Emission(settings.emit, tau) for tau in settings.tau or (None,)]
    return [
        Lane(
            name=emission.label(layout) + ("" if rows is None else f" {rows}"),
            layout=layout,
            drafts=None if layout == "plain" else settings.drafts,
            lookup=settings.lookup,
            emission=emission,
            drafter=settings.drafter,
            rows=rows,
        )
        for layout in settings.layout or ("auto",)
        for rows in ((settings.rows or (None,)) if layout == "tree" else (None,))
        for emission in emissions
    ]


def _as_used(lane: Lane, model: AttachedModel) -> Lane:
    """The lane, named after the layout that its own stands for with this model."""
    from mtp_mlx.planning.choose import layout_in_use

    assert lane.layout is not None
    used = layout_in_use(model, lane.layout, lane.emission)
    return lane if used == lane.layout else replace(lane, name=lane.emission.label(used))


def _header(settings: BenchSettings, model: AttachedModel) -> dict[str, Any]:
    """The fields of the report other than its rows."""
    from mtp_mlx.cli.loading import loading_arguments
    from mtp_mlx.measure.recorded import drafted_with

    return {
        "model": settings.model,
        "adapter": settings.adapter,
        **({"heads": settings.heads} if settings.heads else {}),
        **drafted_with(model),
        "max_tokens": settings.max_tokens,
        **loading_arguments(settings),
    }


def _measure(
    bench: Bench, prompts: Sequence[Prompt], console: Console, on_warm: Callable[[], None] | None
) -> list[Measurement]:
    """Measure every prompt in every lane; after Ctrl-C, return what was measured so far.

    Args:
        bench: what is measured.
        prompts: on which.
        console: for the progress.
        on_warm: called before the first prompt.

    Raises:
        KeyboardInterrupt: if stopped before the first prompt was measured.
    """
    done: list[Measurement] = []
    with Progress(console=console) as progress:
        task = progress.add_task("warming up", total=len(prompts))
        bench.warm_up()
        if on_warm is not None:
            on_warm()
        progress.update(task, description="measuring")

        def on_prompt(_: int, rows: list[Measurement]) -> None:
            done.extend(rows)
            progress.advance(task)

        try:
            bench.run(prompts, on_prompt)
        except KeyboardInterrupt:
            console.print(f"stopped after {len(done) // len(bench.lanes)} of {len(prompts)} prompts")
        if not done:
            raise KeyboardInterrupt
    return done


def _mismatch(measurement: Measurement) -> dict[str, Any]:
    """Where a text first differs from mlx-lm's, and whether a near tie explains it."""
    comparison = measurement.comparison
    different = "DIFFERENT" if measurement.lane.emission.lossless else "different, lossless: false"
    return {
        "verdict": "near-tie" if comparison.certified else different,
        "layout": measurement.lane.name,
        "position": comparison.position,
        "gap": comparison.gap,
        "bound": comparison.bound,
        "prompt": measurement.prompt.text[:60],
    }
