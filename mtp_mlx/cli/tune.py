"""`mtp-mlx tune`: measure every layout and drafter on this machine and record the fastest for layout "auto"."""

from __future__ import annotations

import datetime
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from mtp_mlx.cli.options import LoadingOptions
from mtp_mlx.config import from_yaml, options_for, setting, trust_setting
from mtp_mlx.errors import MTPError

if TYPE_CHECKING:
    from mtp_mlx.measure.lanes import Measurement
    from mtp_mlx.measure.tune import LaneResult
    from mtp_mlx.model.attach import AttachedModel
    from mtp_mlx.planning.tuned import TunedChoice

EPILOG = """\b
Examples:
  mtp-mlx tune
  mtp-mlx tune -m ./model --adapter ./adapter --prompts prompts.jsonl --limit 10
  mtp-mlx tune --forget
"""


@dataclass(frozen=True)
class TuneSettings(LoadingOptions):
    """Options of `mtp-mlx tune`."""

    model: str = setting("smollm2-135m", help="Embedded model, mlx-lm folder or hub id", flag="-m")
    adapter: str = setting("auto", help="Adapter folder or hub id, 'auto' or 'none'", flag="-a")
    heads: str | None = setting(None, help="MTP heads of others: hub id, folder or file")
    adapter_path: str | None = setting(None, help="Fine-tune of mlx_lm.lora to put on the model")
    trust_remote_code: bool = trust_setting()
    prompts: Path | None = setting(None, help="JSONL file of prompts (default: built-in)", flag="-p")
    limit: int | None = setting(None, help="Use this many prompts, spread over the file", minimum=1)
    max_tokens: int = setting(48, help="Tokens per prompt and lane", minimum=2, flag="-n")
    quantize: Literal[4, 8] | None = setting(None, help="Quantise the embedded model to this many bits")
    exact: bool = setting(False, help="Tune decoding with --exact, which is recorded separately")


@click.command(epilog=EPILOG, short_help="Find the fastest layout on this machine")
@options_for(TuneSettings)
@click.option("--forget", is_flag=True, help="Delete the record, so that auto plans again")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object")
def command(forget: bool, as_json: bool, **options: Any) -> None:
    """Measure plain decoding and every layout and drafter of the model, and record the fastest.

    Layout "auto" then uses the record for this model and adapter on this machine, unless --layout, --drafts, --lookup
    or --drafter is given. If nothing beats plain decoding by 5 %, "auto" decodes plainly. Decoding is greedy, and the
    fastest must write mlx-lm's text. Ratios are ratios of totals: all tokens over all seconds. The mean of the
    per-prompt ratios follows in brackets where it differs.
    """
    settings = from_yaml(TuneSettings, None, options)
    if forget:
        click.echo(_forget(settings, as_json))
        return
    from mtp_mlx.measure.prompts import read_prompts
    from mtp_mlx.measure.tune import choose, results
    from mtp_mlx.planning.tuned import remember

    prompts = read_prompts(settings.prompts, settings.limit)
    model, measured = measure(settings, prompts, Console(stderr=True))
    rows, choice = results(measured), choose(measured)
    if not choice.tokens_per_second:
        raise MTPError(
            "every answer ended in its first step, so nothing could be measured: give other prompts with --prompts"
        )
    when = datetime.date.today().isoformat()
    kept = {"date": when, "prompts": len(prompts), "max_tokens": settings.max_tokens}
    path = remember(model, choice, {**kept, "lanes": [row.to_json() for row in rows]})
    if as_json:
        click.echo(json.dumps(report(settings, rows, choice, path)))
    else:
        Console().print(table(rows))
        click.echo(verdict(choice))


def _load(settings: TuneSettings) -> tuple[AttachedModel, Any]:
    from mtp_mlx.cli.loading import load_model
    from mtp_mlx.decode.drafter import source_of

    model, tokenizer = load_model(settings)
    source = source_of(model)
    if source is not None and source.fixed:
        raise MTPError("tune finds how many drafts pay off: leave the number of drafts of every step out")
    return model, tokenizer


def _forget(settings: TuneSettings, as_json: bool) -> str:
    from mtp_mlx.planning.tuned import forget

    known = forget(_load(settings)[0])
    if as_json:
        return json.dumps({"model": settings.model, "adapter": settings.adapter, "forgotten": known})
    return "Record deleted: auto plans again." if known else "There is no record for this model and adapter."


def measure(
    settings: TuneSettings, prompts: list[Any], console: Console
) -> tuple[AttachedModel, list[Measurement]]:
    """The model, and measurements of every prompt in every lane."""
    from mtp_mlx.measure.lanes import Bench
    from mtp_mlx.measure.tune import candidates

    model, tokenizer = _load(settings)
    lanes = candidates(model)
    bench = Bench(model, tokenizer, lanes, settings.max_tokens)
    with Progress(console=console) as progress:
        task = progress.add_task("warming up", total=len(prompts))
        bench.warm_up()
        progress.update(task, description=f"measuring {len(lanes)} lanes")
        measured = bench.run(prompts, lambda *_: progress.advance(task))
    return model, measured


def report(
    settings: TuneSettings, rows: list[LaneResult], choice: TunedChoice, path: Path | None
) -> dict[str, Any]:
    """The object that --json prints."""
    return {
        "model": settings.model,
        "adapter": settings.adapter,
        **({"heads": settings.heads} if settings.heads else {}),
        "max_tokens": settings.max_tokens,
        "choice": {
            "name": choice.name,
            "layout": choice.layout,
            "drafts": choice.drafts,
            "slots": choice.drafts,  # the old name of "drafts"
            "drafter": choice.drafter,
        },
        "beats_plain": choice.layout != "plain",
        "tok_per_s": round(choice.tokens_per_second, 3),
        "plain_tok_per_s": round(choice.plain_tokens_per_second, 3),
        "lanes": [row.to_json() for row in rows],
        "kept_in": None if path is None else str(path),
    }


def table(rows: list[LaneResult]) -> Table:
    """A table of the rows, fastest first."""
    from mtp_mlx.measure.rows import RATIO, SAME_TEXT, lane_table
    from mtp_mlx.measure.speed import ratio_text

    title = "every lane on this machine, compared with plain decoding of the same weights"
    out = lane_table(title, ("lane",), ("tok/s", RATIO, "tok/step", SAME_TEXT))
    for row in rows:
        same = f"no: {row.refused} DIFFER" if row.refused else "yes"
        out.add_row(
            row.lane,
            f"{row.tokens_per_second:.2f}",
            ratio_text(row.speed_up, row.mean_of_ratios),
            f"{row.tokens_per_step:.2f}",
            same,
        )
    return out


def verdict(choice: TunedChoice) -> str:
    """The concluding sentence."""
    plain = f"{choice.plain_tokens_per_second:.1f} tok/s"
    if choice.layout == "plain":
        return f"Nothing beats plain decoding here ({plain}); auto now decodes plainly for this model and adapter."
    factor = choice.tokens_per_second / choice.plain_tokens_per_second
    return f"{choice.name} is fastest, {factor:.2f}x plain ({plain}); auto now uses it for this model and adapter."
