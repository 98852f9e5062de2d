"""Measurements summed up by category, as plain values for `--json` and as a table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import mean
from typing import Any

from rich.table import Table

from mtp_mlx.decode.stats import DecodeStats
from mtp_mlx.measure.lanes import Measurement


@dataclass(frozen=True)
class Row:
    """One category (or all) in one lane."""

    lane: str
    category: str
    prompts: int
    plain_tokens_per_second: float
    tokens_per_second: float
    speedup: float | None
    tokens_per_step: float
    rows_per_step: float
    identical: int
    certified: int
    refused: int
    lossless: bool
    acceptance: list[float | None]

    def to_json(self) -> dict[str, Any]:
        """Plain values, rounded to what was measured."""
        values = dict(vars(self))
        for name in (
            "plain_tokens_per_second",
            "tokens_per_second",
            "tokens_per_step",
            "rows_per_step",
            "speedup",
        ):
            values[name] = None if values[name] is None else round(values[name], 4)
        values["acceptance"] = [None if value is None else round(value, 4) for value in self.acceptance]
        return values


def summarise(measurements: Sequence[Measurement]) -> list[Row]:
    """One row per lane and category, then one per lane over all prompts.

    tokens/s are totals over totals; the speed-up of a category is the mean over its prompts' ratios, and the
    overall speed-up the mean over all prompts. Prompts refused (text differs, no certificate) are in none.
    In lanes of unverified emission texts may differ: nothing is refused, and the row is labelled `lossless: false`.
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
    ratios = [m.speedup for m in own if m.speedup is not None]
    stats = DecodeStats()
    for measurement in own:
        stats.add(measurement.timed.stats)
    certified = sum(m.comparison.certified for m in own)
    identical = sum(m.comparison.identical for m in own)
    return Row(
        lane=lane,
        category=category,
        prompts=len(own),
        plain_tokens_per_second=_rate([m.reference for m in own]),
        tokens_per_second=_rate([m.timed for m in own]),
        speedup=mean(ratios) if ratios else None,
        tokens_per_step=stats.tokens_per_step,
        rows_per_step=stats.rows_per_step,
        identical=identical,
        certified=certified,
        refused=len(own) - identical - certified if stats.lossless else 0,
        lossless=stats.lossless,
        acceptance=stats.acceptance,
    )


def _rate(timed: Sequence[Any]) -> float:
    seconds = sum(one.seconds for one in timed if one.timed_tokens)
    return sum(one.timed_tokens for one in timed) / seconds if seconds else 0.0


def table(rows: Sequence[Row]) -> Table:
    """The rows as a rich table."""
    out = Table(title="mtp-mlx against mlx-lm plain, same weights, same process")
    for name in (
        "layout",
        "category",
        "prompts",
        "plain tok/s",
        "tok/s",
        "ratio",
        "tok/step",
        "rows/step",
        "same text",
    ):
        out.add_column(name, justify="left" if name in ("layout", "category") else "right")
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
            "refused" if row.speedup is None else f"{row.speedup:.2f}x",
            f"{row.tokens_per_step:.2f}",
            f"{row.rows_per_step:.1f}",
            same,
            end_section=row.category == "all",
        )
    return out
