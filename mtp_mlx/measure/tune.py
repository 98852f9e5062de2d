"""Finds the fastest layout and drafter on this machine: every lane that a model has, measured side by side."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mtp_mlx.decode.drafter import source_of
from mtp_mlx.decode.policy import LayoutName
from mtp_mlx.decode.stats import DecodeStats
from mtp_mlx.measure.lanes import Lane, Measurement, Timed
from mtp_mlx.measure.rows import rounded
from mtp_mlx.measure.speed import compare_speeds, rate
from mtp_mlx.model.attach import AttachedModel
from mtp_mlx.planning.choose import LOOKUP_DRAFTS
from mtp_mlx.planning.tuned import TunedChoice

TREE_ROWS = (8, 16)  # rows of the trees that are measured
MARGIN = 1.05  # a lane must be this much faster than plain decoding; less is noise


@dataclass(frozen=True)
class LaneResult:
    """One lane over all prompts.

    Attributes:
        lane: its name.
        tokens_per_second: all tokens over all seconds, without prefill and first step.
        speed_up: as a multiple of plain decoding, mlx-lm's or our own, whichever is faster; a ratio of totals.
        mean_of_ratios: the mean of the prompts' own ratios, to be read beside `speed_up`.
        tokens_per_step: all tokens over all steps.
        refused: prompts whose text differs from mlx-lm's by more than a near-tie; a lane with any cannot win.
    """

    lane: str
    tokens_per_second: float
    speed_up: float
    mean_of_ratios: float
    tokens_per_step: float
    refused: int

    def to_json(self) -> dict[str, Any]:
        """Plain values, rounded."""
        return rounded(self)


def candidates(model: AttachedModel) -> list[Lane]:
    """Plain decoding, every fixed layout with some numbers of drafts, and the planner, with every drafter."""
    lanes = [Lane("plain", "plain")]
    source = source_of(model)
    if source is not None:
        own = source.name
        grouped = source.places_slots and not model.why_linear
        layouts: tuple[LayoutName, ...] = ("linear", "quadratic") if grouped else ("linear",)
        counts = _counts(model.most_drafts)
        lanes += [
            Lane(f"{layout} {count} {own}", layout, count, drafter=own)
            for layout in layouts
            for count in counts
        ]
        lanes += [
            Lane(f"{layout} {counts[-1]} {own}, lookup", layout, counts[-1], drafter=f"{own},lookup")
            for layout in layouts
        ]
        lanes += [
            Lane(f"tree {rows} rows {own}, lookup", "tree", counts[-1], drafter=f"{own},lookup", rows=rows)
            for rows in TREE_ROWS
            if grouped
        ]
        lanes += [Lane(f"auto {who}", "auto", drafter=who) for who in (own, f"{own},lookup")]
    lanes.append(Lane(f"linear {LOOKUP_DRAFTS} lookup", "linear", LOOKUP_DRAFTS, drafter="lookup"))
    lanes.append(Lane("auto lookup", "auto", drafter="lookup"))
    return lanes


def _counts(most: int) -> list[int]:
    """1, 2, 4, ... and the most."""
    return sorted({1 << power for power in range(most.bit_length()) if 1 << power <= most} | {most})


def results(measurements: Sequence[Measurement]) -> list[LaneResult]:
    """One row per lane, fastest first."""
    lanes = dict.fromkeys(measurement.lane.name for measurement in measurements)
    plain = plain_timings(measurements)
    rows = []
    for name in lanes:
        own = [measurement for measurement in measurements if measurement.lane.name == name]
        speeds = compare_speeds(zip([measurement.timed for measurement in own], plain, strict=True))
        stats = DecodeStats()
        for measurement in own:
            stats.add(measurement.timed.stats)
        rows.append(
            LaneResult(
                lane=name,
                tokens_per_second=speeds.tokens_per_second,
                speed_up=speeds.speedup or 0.0,
                mean_of_ratios=speeds.mean_of_ratios or 0.0,
                tokens_per_step=stats.tokens_per_step,
                refused=sum(measurement.refused for measurement in own),
            )
        )
    return sorted(rows, key=lambda row: -row.tokens_per_second)


def plain_timings(measurements: Sequence[Measurement]) -> list[Timed]:
    """Every prompt without drafts: from mlx-lm or our own plain layout, whichever is faster over all prompts."""
    lane = measurements[0].lane.name
    theirs = [measurement.reference for measurement in measurements if measurement.lane.name == lane]
    ours = [measurement.timed for measurement in measurements if measurement.lane.layout == "plain"]
    return max(theirs, ours, key=rate)


def choose(measurements: Sequence[Measurement]) -> TunedChoice:
    """The fastest lane whose texts are all mlx-lm's, or plain decoding if none beats it by `MARGIN`."""
    plain = rate(plain_timings(measurements))
    lanes = {measurement.lane.name: measurement.lane for measurement in measurements}
    for row in results(measurements):
        lane = lanes[row.lane]
        if row.refused or lane.layout is None or lane.layout == "plain":
            continue
        if row.speed_up < MARGIN:
            break
        speed = row.tokens_per_second
        return TunedChoice(lane.name, lane.layout, lane.drafts, lane.drafter, speed, plain, lane.rows)
    return TunedChoice("plain", "plain", None, None, plain, plain)
