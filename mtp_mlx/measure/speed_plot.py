"""Tokens per second by category, with and without drafts, and acceptance by depth, as an SVG file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from mtp_mlx.measure.plot import Panel, document, escaped
from mtp_mlx.measure.speed import ratio_text

COLOURS = ("#7f7f7f", "#1f77b4", "#ff7f0e", "#2ca02c", "#d62728", "#9467bd", "#8c564b", "#e377c2")
LEFT, RIGHT, TOP, BAR_HEIGHT, DEPTH_HEIGHT = 60, 20, 40, 260, 200
GAP, LEGEND_LINE = 70, 18
BAR, LEAST_WIDTH = 14, 640
PLAIN = "without (plain)"


class SpeedRow(Protocol):
    """What is drawn of a row of `mtp-mlx bench` or `mtp-mlx eval`."""

    @property
    def lane(self) -> str: ...
    @property
    def category(self) -> str: ...
    @property
    def tokens_per_second(self) -> float: ...
    @property
    def plain_tokens_per_second(self) -> float: ...
    @property
    def speedup(self) -> float | None: ...
    @property
    def mean_of_ratios(self) -> float | None: ...
    @property
    def acceptance(self) -> list[float | None]: ...
    @property
    def lossless(self) -> bool: ...


@dataclass(frozen=True)
class _Bars:
    """What the bars show.

    Attributes:
        speeds: tokens per second by category and name.
        names: of the bars of a category; {name: what the legend says}.
    """

    categories: list[str]
    names: dict[str, str]
    speeds: dict[tuple[str, str], float]


def svg(rows: Sequence[SpeedRow], title: str) -> str:
    """The document: above, a group of bars for each category; below, a line for each lane that verified drafts."""
    bars = _bars(rows)
    group = (len(bars.names) + 1) * BAR
    width = max(LEAST_WIDTH, LEFT + RIGHT + group * len(bars.categories))
    lines = [row for row in _whole(rows) if any(value is not None for value in row.acceptance)]
    bottom = TOP + BAR_HEIGHT + GAP + (DEPTH_HEIGHT + GAP if lines else 0)
    parts = _bar_chart(bars, width, group)
    if lines:
        parts += _depth_chart(lines, list(bars.names), width, TOP + BAR_HEIGHT + GAP)
    for index, text in enumerate(bars.names.values()):
        y = bottom + LEGEND_LINE * index
        parts.append(f'<rect x="{LEFT}" y="{y - 10}" width="12" height="12" fill="{_colour(index)}"/>')
        parts.append(f'<text x="{LEFT + 18}" y="{y}">{escaped(text)}</text>')
    return document(width, bottom + LEGEND_LINE * len(bars.names) + 10, title, parts)


def _bars(rows: Sequence[SpeedRow]) -> _Bars:
    names = {PLAIN: PLAIN}
    for row in _whole(rows):
        if row.lane != "plain":
            ratio = "" if row.speedup is None else f": {ratio_text(row.speedup, row.mean_of_ratios)}"
            names[_name(row)] = _name(row) + ratio
    speeds = {(row.category, _name(row)): row.tokens_per_second for row in rows if row.lane != "plain"}
    speeds |= {(row.category, PLAIN): row.plain_tokens_per_second for row in rows}
    return _Bars(list(dict.fromkeys(row.category for row in rows)), names, speeds)


def _name(row: SpeedRow) -> str:
    return row.lane + ("" if row.lossless else " (lossy)")


def _whole(rows: Sequence[SpeedRow]) -> list[SpeedRow]:
    """The row over all categories of each lane, which is the lane's last."""
    return list({row.lane: row for row in rows}.values())


def _bar_chart(bars: _Bars, width: int, group: int) -> list[str]:
    most = max([*bars.speeds.values(), 1e-9]) * 1.1
    panel = Panel(LEFT, TOP, width - LEFT - RIGHT, BAR_HEIGHT, (0, 1), (0, most))
    parts = _scale(panel, "tokens per second")
    for column, category in enumerate(bars.categories):
        left = LEFT + column * group + BAR / 2
        for index, name in enumerate(bars.names):
            speed = bars.speeds.get((category, name))
            if speed is None:
                continue
            y = panel.y(speed)
            parts.append(
                f'<rect class="bar" x="{left + index * BAR:.1f}" y="{y:.1f}" width="{BAR - 2}" '
                f'height="{panel.bottom - y:.1f}" fill="{_colour(index)}"><title>{escaped(category)}, '
                f"{escaped(name)}: {speed:.1f} tok/s</title></rect>"
            )
        x = left + len(bars.names) * BAR / 2
        parts.append(
            f'<text transform="translate({x:.1f},{panel.bottom + 14}) rotate(30)" font-size="11">'
            f"{escaped(category)}</text>"
        )
    return parts


def _depth_chart(rows: Sequence[SpeedRow], names: Sequence[str], width: int, top: int) -> list[str]:
    depths = max(len(row.acceptance) for row in rows)
    panel = Panel(LEFT, top, width - LEFT - RIGHT, DEPTH_HEIGHT, (0, depths + 1), (0, 1))
    parts = _scale(panel, "acceptance by depth of the draft")
    parts += [panel.x_label(depth, 16) for depth in range(1, depths + 1)]
    for row in rows:
        points = [(depth, value) for depth, value in enumerate(row.acceptance, start=1) if value is not None]
        parts += panel.line(points, _colour(names.index(_name(row)) if _name(row) in names else 0))
    return parts


def _scale(panel: Panel, label: str) -> list[str]:
    """The y axis in fifths, and its label above."""
    values = [panel.up[1] * fifth / 5 for fifth in range(6)]
    parts = [f'<text x="{panel.left}" y="{panel.top - 6}">{label}</text>']
    return parts + panel.y_grid((value, f"{value:.3g}") for value in values)


def _colour(index: int) -> str:
    return COLOURS[index % len(COLOURS)]
