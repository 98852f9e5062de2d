"""`mtp-mlx plan`: project measured acceptance onto a published cost curve of another machine."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.console import Console
from rich.table import Table

from mtp_mlx.config import from_yaml, options_for, setting
from mtp_mlx.errors import MTPError

if TYPE_CHECKING:
    from mtp_mlx.measure.curves import CostCurve
    from mtp_mlx.measure.projection import Projection
    from mtp_mlx.measure.recorded import MeasuredAcceptance

EPILOG = """\b
Examples:
  mtp-mlx plan --curve m4-pro
  mtp-mlx plan --curve m5-max --bench report.json --draft-cost 0.02
  mtp-mlx plan --curve curve.json --adapter ./adapter --json
"""


@dataclass(frozen=True)
class PlanSettings:
    """Options of `mtp-mlx plan`."""

    curve: tuple[str, ...] = setting((), help="Built-in curve or JSON file; may be repeated")
    adapter: str | None = setting(
        None, help="Adapter folder or hub id, with its acceptance (default: bundled)", flag="-a"
    )
    bench: Path | None = setting(None, help="JSON of bench or eval to take the acceptance from")
    lane: str | None = setting(None, help="Lane of --bench to use (default: first fixed layout)")
    draft_cost: float = setting(0.0, help="Cost of drafting a token, in plain steps", minimum=0)


@dataclass(frozen=True)
class Plan:
    """The projections of one acceptance on one curve."""

    measured: MeasuredAcceptance
    curve: CostCurve
    projections: list[Projection]


@click.command(epilog=EPILOG, short_help="Project the speed-up on other machines")
@options_for(PlanSettings)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object")
def command(as_json: bool, **options: Any) -> None:
    """Project the speed-up that the measured acceptance would give on another machine.

    This is a projection, not a measurement: it uses a published cost curve, timed on another machine and mostly with
    another model. Without --curve, all built-in curves are used. Nothing is projected beyond the last point of a
    curve. Slot rows are assumed to cost as much as real rows, and drafting a token --draft-cost.
    """
    settings = from_yaml(PlanSettings, None, options)
    plans = make(settings)
    if as_json:
        click.echo(json.dumps(report(plans, settings)))
        return
    console = Console()
    for curve in dict.fromkeys(plan.curve for plan in plans):
        own = [plan for plan in plans if plan.curve == curve]
        console.print(table(own))
        click.echo("\n".join(notes(own)) + "\n")


def make(settings: PlanSettings) -> list[Plan]:
    """Project every acceptance onto every curve.

    Raises:
        MTPError: if a curve is unknown, there is no acceptance, or options contradict each other.
    """
    from mtp_mlx.measure.curves import built_in, read_curve
    from mtp_mlx.measure.projection import project
    from mtp_mlx.measure.recorded import from_adapter, from_report

    curves = [read_curve(name) for name in settings.curve or built_in()]
    if settings.bench is not None and settings.adapter is not None:
        raise MTPError("both --adapter and --bench were given: give one of them")
    if settings.lane is not None and settings.bench is None:
        raise MTPError("--lane names a lane of a report: give the report with --bench")
    if settings.bench is not None:
        measured = from_report(settings.bench, settings.lane)
    else:
        measured = [from_adapter(_adapter_folder(settings.adapter))]
    return [
        Plan(one, curve, project(curve, one.acceptance, one.chained, settings.draft_cost, one.linear_only))
        for curve in curves
        for one in measured
    ]


def _adapter_folder(given: str | None) -> Path:
    """The folder of the adapter that `--adapter` names, or of the bundled one."""
    from mtp_mlx import hub
    from mtp_mlx.models import EMBEDDED, bundled_adapter, named_adapter

    folder = named_adapter(given) if given else bundled_adapter(next(iter(EMBEDDED)))
    if folder is None:
        raise MTPError("this package has no bundled adapter: name one with --adapter, or give --bench FILE")
    return hub.fetch_adapter(given) if given and not folder.exists() and hub.is_repository(given) else folder


def report(plans: list[Plan], settings: PlanSettings) -> dict[str, Any]:
    """The object that --json prints."""
    from mtp_mlx.measure.projection import LABEL, best

    return {
        "label": LABEL,
        "draft_cost": settings.draft_cost,
        "plans": [
            {
                "curve": plan.curve.name,
                "machine": plan.curve.machine,
                "cost_of": plan.curve.of,
                "source": plan.curve.source,
                "acceptance": list(plan.measured.acceptance),
                "acceptance_of": plan.measured.name,
                "acceptance_source": plan.measured.source,
                "projections": [projection.to_json() for projection in plan.projections],
                "best": chosen.to_json() if (chosen := best(plan.projections)) else None,
            }
            for plan in plans
        ],
    }


def table(plans: list[Plan]) -> Table:
    """The table of one curve: every layout if there is one acceptance, else the best layout of each."""
    from mtp_mlx.measure.projection import LABEL, best

    curve = plans[0].curve
    out = Table(title=f"{curve.name}: {LABEL}", title_justify="left")
    for name in ("acceptance of", "layout", "drafts", "rows", "tok/step", "speed-up (projected)"):
        out.add_column(name, justify="left" if name in ("acceptance of", "layout") else "right")
    for plan in plans:
        shown = plan.projections if len(plans) == 1 else [best(plan.projections)]
        for projection in shown:
            out.add_row(plan.measured.name, *_cells(projection, curve))
    return out


def _cells(projection: Projection | None, curve: CostCurve) -> tuple[str, ...]:
    if projection is None:
        return ("plain", "-", "1", "1.00", "plain is best")
    rows = "-" if projection.rows is None else str(projection.rows)
    if projection.low is None or projection.high is None:
        return (projection.layout, str(projection.drafts), rows, "-", f"curve ends at {curve.most_rows} rows")
    tokens = "-" if projection.tokens_per_step is None else f"{projection.tokens_per_step:.2f}"
    low, high = f"{projection.low:.2f}", f"{projection.high:.2f}"
    factor = f"{low}x" if low == high else f"{low}x to {high}x"
    return (projection.layout, str(projection.drafts), rows, tokens, factor)


def notes(plans: list[Plan]) -> list[str]:
    """The sources of the figures, and the conclusion."""
    from mtp_mlx.measure.projection import best

    curve = plans[0].curve
    lines = [f"cost: {curve.of}; {curve.machine}; {curve.source}"]
    lines += [f"acceptance: {source}" for source in dict.fromkeys(plan.measured.source for plan in plans)]
    if len(plans) == 1:
        lines.append(_verdict(plans[0].projections, best(plans[0].projections)))
    return lines


def _verdict(projections: list[Projection], chosen: Projection | None) -> str:
    if chosen is not None:
        name = f"{chosen.layout} with at most {chosen.drafts} draft{'s' if chosen.drafts > 1 else ''}"
        return f"Best projected: {name}. Measure it there with `mtp-mlx tune`."
    if any((projection.high or 0) > 1 for projection in projections):
        return "Projected to beat plain decoding at the lowest of these costs, but not at the highest."
    return "Nothing is projected to beat plain decoding here."
