"""Which layout and drafter is fastest on this machine: every lane that a model has, measured side by side."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from mtp_mlx.decode.drafter import source_of
from mtp_mlx.decode.policy import LayoutName
from mtp_mlx.decode.stats import DecodeStats
from mtp_mlx.measure.lanes import Lane, Measurement, Timed
from mtp_mlx.model.attach import AttachedModel
from mtp_mlx.planning.choose import LOOKUP_DRAFTS
from mtp_mlx.planning.tuned import TunedChoice

MARGIN = 1.05  # a lane must be this much faster than plain decoding: less is within a machine's noise


@dataclass(frozen=True)
class LaneResult:
    """One lane over all prompts.

    Attributes:
        lane: its name.
        tokens_per_second: totals over totals, without prompt and first step.
        speed_up: over the faster one of mlx-lm's and our own plain decoding.
        tokens_per_step: totals over totals.
        refused: prompts whose text differs from mlx-lm's beyond a near-tie; a lane with any cannot win.
    """

    lane: str
    tokens_per_second: float
    speed_up: float
    tokens_per_step: float
    refused: int

    def to_json(self) -> dict[str, Any]:
        """Plain values, rounded."""
        return {k: round(v, 4) if isinstance(v, float) else v for k, v in asdict(self).items()}


def candidates(model: AttachedModel) -> list[Lane]:
    """Plain decoding, every layout with some numbers of drafts, every drafter, and the planner with each of them."""
    lanes = [Lane("plain", "plain")]
    source = source_of(model)
    if source is not None:
        own = source.name
        layouts: tuple[LayoutName, ...] = ("linear", "quadratic") if source.places_slots else ("linear",)
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
    plain = plain_speed(measurements)
    rows = []
    for name in lanes:
        own = [measurement for measurement in measurements if measurement.lane.name == name]
        speed = _rate([measurement.timed for measurement in own])
        stats = DecodeStats()
        for measurement in own:
            stats.add(measurement.timed.stats)
        refused = sum(not (m.comparison.identical or m.comparison.certified) for m in own)
        rows.append(LaneResult(name, speed, speed / plain if plain else 0.0, stats.tokens_per_step, refused))
    return sorted(rows, key=lambda row: -row.tokens_per_second)


def plain_speed(measurements: Sequence[Measurement]) -> float:
    """Tokens per second without drafts: the faster one of mlx-lm's generation and our own plain layout."""
    lane = measurements[0].lane.name
    theirs = _rate([measurement.reference for measurement in measurements if measurement.lane.name == lane])
    ours = _rate([measurement.timed for measurement in measurements if measurement.lane.layout == "plain"])
    return max(theirs, ours)


def choose(measurements: Sequence[Measurement]) -> TunedChoice:
    """The fastest lane whose texts are all mlx-lm's, or plain decoding where none is faster by the margin."""
    plain = plain_speed(measurements)
    lanes = {measurement.lane.name: measurement.lane for measurement in measurements}
    for row in results(measurements):
        lane = lanes[row.lane]
        if row.refused or lane.layout is None or lane.layout == "plain":
            continue
        if row.speed_up < MARGIN:
            break
        return TunedChoice(lane.name, lane.layout, lane.slots, lane.drafter, row.tokens_per_second, plain)
    return TunedChoice("plain", "plain", None, None, plain, plain)


def _rate(timed: Sequence[Timed]) -> float:
    seconds = sum(one.seconds for one in timed if one.timed_tokens)
    return sum(one.timed_tokens for one in timed) / seconds if seconds else 0.0
