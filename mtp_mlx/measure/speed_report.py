"""Measurements summarised by lane and category: JSON values and a table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rich.table import Table

from mtp_mlx.decode.stats import DecodeStats
from mtp_mlx.measure.lanes import Measurement
from mtp_mlx.measure.rows import RATIO, SAME_TEXT, lane_table, rounded
from mtp_mlx.measure.speed import compare_speeds, ratio_text


@dataclass(frozen=True)
class Row:
    """One category (or all) in one lane.

    Attributes:
        plain_tokens_per_second, tokens_per_second: mlx-lm's and the lane's, all tokens over all seconds.
        speedup: the ratio of these two; None if no prompt counts.
        mean_of_ratios: the mean of the prompts' own ratios, to be read beside `speedup`.
        identical, certified, refused: prompts whose text equals mlx-lm's, differs by a near-tie, differs by more.
        lossless: False for unverified emission.
        acceptance: per depth, P(accepted | reached).
        tokens: written in all steps.
        drafted_by: of these, the accepted drafts of each drafter.
        submitted_by: the drafts of each drafter that were verified.
    """

    lane: str
    category: str
    prompts: int
    plain_tokens_per_second: float
    tokens_per_second: float
    speedup: float | None
    mean_of_ratios: float | None
    tokens_per_step: float
    rows_per_step: float
    identical: int
    certified: int
    refused: int
    lossless: bool
    acceptance: list[float | None]
    tokens: int
    drafted_by: dict[str, int]
    submitted_by: dict[str, int]

    def to_json(self) -> dict[str, Any]:
        """Plain values, rounded."""
        return rounded(self)


def summarise(measurements: Sequence[Measurement]) -> list[Row]:
    """One row per lane and category, then one per lane over all prompts.

    Refused prompts count in no speed. In lanes of unverified emission texts may differ: none is refused, and the row
    is labelled `lossless: false`.
    """
    rows = []
    for lane in dict.fromkeys(measurement.lane.name for measurement in measurements):
        own = [measurement for measurement in measurements if measurement.lane.name == lane]
        categories = list(dict.fromkeys(measurement.prompt.category for measurement in own))
        for category in categories:
            rows.append(_row(lane, category, [m for m in own if m.prompt.category == category]))
        if len(categories) > 1:
            rows.append(_row(lane, "all", own))
    return rows


def _row(lane: str, category: str, own: Sequence[Measurement]) -> Row:
    speeds = compare_speeds((m.timed, m.reference) for m in own if not m.refused)
    stats = DecodeStats()
    for measurement in own:
        stats.add(measurement.timed.stats)
    certified = sum(m.comparison.certified for m in own)
    identical = sum(m.comparison.identical for m in own)
    return Row(
        lane=lane,
        category=category,
        prompts=len(own),
        plain_tokens_per_second=speeds.plain_tokens_per_second,
        tokens_per_second=speeds.tokens_per_second,
        speedup=speeds.speedup,
        mean_of_ratios=speeds.mean_of_ratios,
        tokens_per_step=stats.tokens_per_step,
        rows_per_step=stats.rows_per_step,
        identical=identical,
        certified=certified,
        refused=sum(m.refused for m in own),
        lossless=stats.lossless,
        acceptance=stats.acceptance,
        tokens=stats.tokens,
        drafted_by=dict(stats.drafted_by),
        submitted_by=dict(stats.submitted_by),
    )


def table(rows: Sequence[Row]) -> Table:
    """A table of the rows."""
    out = lane_table(
        "mtp-mlx against mlx-lm plain, same weights, same process",
        ("layout", "category"),
        ("prompts", "plain\ntok/s", "tok/s", RATIO, "tok/\nstep", "rows/\nstep", SAME_TEXT),
    )
    for row in rows:
        same = f"{row.identical}/{row.prompts}" + (f" +{row.certified} near-tie" if row.certified else "")
        same += f" ({row.refused} DIFFER)" if row.refused else ""
        same += "" if row.lossless else " (lossless: false)"
        out.add_row(
            row.lane,
            row.category,
            str(row.prompts),
            f"{row.plain_tokens_per_second:.2f}",
            f"{row.tokens_per_second:.2f}",
            ratio_text(row.speedup, row.mean_of_ratios, "refused" if row.refused else "-"),
            f"{row.tokens_per_step:.2f}",
            f"{row.rows_per_step:.1f}",
            same,
            end_section=row.category == "all",
        )
    return out


def earnings(rows: Sequence[Row]) -> Table | None:
    """A table of the tokens that each drafter brought; None if nothing was drafted."""
    drafters = sorted({drafter for row in rows for drafter in row.submitted_by})
    if not drafters:
        return None
    out = lane_table("accepted drafts, in % of all tokens", ("layout", "category"), ("tokens", *drafters))
    for row in rows:
        shares = [_share(row, drafter) for drafter in drafters]
        out.add_row(row.lane, row.category, str(row.tokens), *shares, end_section=row.category == "all")
    return out


def _share(row: Row, drafter: str) -> str:
    """Accepted drafts of a drafter, in per cent of the tokens; "-" if none was verified."""
    if not row.submitted_by.get(drafter):
        return "-"
    return f"{100 * row.drafted_by.get(drafter, 0) / row.tokens:.0f} %"
