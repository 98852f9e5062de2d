"""`mtp-mlx bench`: mlx-lm plain and mtp-mlx on the same weights and prompts, alternating in one process."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.console import Console
from rich.progress import Progress

from mtp_mlx.errors import MTPError

if TYPE_CHECKING:
    from mtp_mlx.decode.emission import EmitName
    from mtp_mlx.measure.lanes import Bench, Measurement
    from mtp_mlx.measure.prompts import Prompt

EPILOG = """\b
Examples:
  mtp-mlx bench
  mtp-mlx bench --prompts prompts.jsonl --layout auto --layout quadratic --max-tokens 128
  mtp-mlx bench --layout linear --limit 4 --plot bench.svg
  mtp-mlx bench --layout plain --json
"""


@click.command(epilog=EPILOG, short_help="Compare the speed and text with plain mlx-lm")
@click.option(
    "--model", "-m", default="smollm2-135m", show_default=True, help="Embedded model, folder or hub id"
)
@click.option("--adapter", default="auto", show_default=True, help="Adapter folder, 'auto' or 'none'")
@click.option("--prompts", type=click.Path(path_type=Path), help="JSONL with prompt (or turns) and category")
@click.option("--limit", type=click.IntRange(1), help="At most this many prompts, spread over the file")
@click.option("--per-category", type=click.IntRange(1), help="At most this many prompts per category")
@click.option(
    "--layout",
    "layouts",
    multiple=True,
    type=click.Choice(["auto", "linear", "quadratic", "plain"]),
    help="Layout to measure, may be repeated (default: auto)",
)
@click.option("--slots", type=click.IntRange(1), help="Mask slots k of fixed layouts")
@click.option("--loop", type=click.IntRange(1, 16), help="Apply MTP heads in turn until so many are drafted")
@click.option(
    "--lookup/--no-lookup", default=None, help="Draft from the text itself too (default: in auto only)"
)
@click.option("--drafter", help="Who drafts: heads, slots, lookup, or two as in heads,lookup")
@click.option(
    "--emit",
    type=click.Choice(["verified", "conf-adapt", "static"]),
    default="verified",
    show_default=True,
    help="Drafts: verified, or unverified (lossy)",
)
@click.option("--tau", type=float, multiple=True, help="Least probability of a draft, may be repeated")
@click.option(
    "--max-tokens", type=click.IntRange(2), default=128, show_default=True, help="Tokens per prompt"
)
@click.option("--quantize", type=click.Choice(["4", "8"]), help="Bits, embedded model only")
@click.option("--exact", is_flag=True, help="Same bits as plain decoding, also in near ties; slower")
@click.option("--plot", type=click.Path(path_type=Path), help="Draw speed and acceptance into this SVG file")
@click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout")
def command(
    model: str,
    adapter: str,
    prompts: Path | None,
    limit: int | None,
    per_category: int | None,
    layouts: tuple[str, ...],
    slots: int | None,
    loop: int | None,
    lookup: bool | None,
    drafter: str | None,
    emit: EmitName,
    tau: tuple[float, ...],
    max_tokens: int,
    quantize: str | None,
    exact: bool,
    plot: Path | None,
    as_json: bool,
) -> None:
    """Measure tokens per second, tokens per step and identical text, by category."""
    from mtp_mlx.api import load
    from mtp_mlx.decode.emission import Emission
    from mtp_mlx.files import write_text
    from mtp_mlx.measure import plain_speed
    from mtp_mlx.measure.lanes import Bench, Lane
    from mtp_mlx.measure.prompts import read_prompts
    from mtp_mlx.measure.speed_plot import svg
    from mtp_mlx.measure.speed_report import summarise, table

    emissions = [Emission(emit, threshold) for threshold in tau or (None,)]
    if lookup and emit != "verified":
        raise MTPError("lookup drafts must be verified: leave --lookup out, or use --emit verified")
    chosen = read_prompts(prompts, limit, per_category)
    console = Console(stderr=True)
    bits = int(quantize) if quantize else None
    folder = None if adapter == "none" else adapter
    attached, tokenizer = load(model, folder, quantize=bits, exact=exact, loop=loop)
    lanes = [
        Lane(emission.label(layout), layout, slots if layout != "plain" else None, lookup, emission, drafter)  # type: ignore[arg-type]
        for layout in layouts or ("auto",)
        for emission in emissions
    ]
    done = _measure(Bench(attached, tokenizer, lanes, max_tokens), chosen, console)
    rows = summarise(done)
    tokens = sum(measurement.reference.timed_tokens for measurement in done)
    plain_speed.remember(model, rows[-1].plain_tokens_per_second, tokens, quantize=bits)
    if plot is not None:
        write_text(plot, svg(rows, f"{model}, mtp-mlx against mlx-lm plain"))
    if as_json:
        mismatches = [_mismatch(m) for m in done if not m.comparison.identical]
        report = {
            "model": model,
            "adapter": adapter,
            "method": None if attached.info is None else attached.info.to_json()["method"],
            "max_tokens": max_tokens,
            "loop": loop,
            "rows": [row.to_json() for row in rows],
        }
        click.echo(json.dumps({**report, "mismatches": mismatches}))
    else:
        Console().print(table(rows))
        for measurement in done:
            if not measurement.comparison.identical:
                click.echo(" ".join(f"{key}={value}" for key, value in _mismatch(measurement).items()))


def _measure(bench: Bench, prompts: Sequence[Prompt], console: Console) -> list[Measurement]:
    """Every prompt in every lane; after Ctrl-C what was measured until then.

    Raises:
        KeyboardInterrupt: stopped before anything was.
    """
    done: list[Measurement] = []
    with Progress(console=console) as progress:
        task = progress.add_task("warming up", total=len(prompts))
        bench.warm_up()
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
    """Where a text parted from mlx-lm's, and whether a near-tie explains it."""
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
