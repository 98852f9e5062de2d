"""Tokens per second by category, with and without, and acceptance by depth, as an SVG file written by hand."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

COLOURS = ("#7f7f7f", "#1f77b4", "#ff7f0e", "#2ca02c", "#d62728", "#9467bd", "#8c564b", "#e377c2")
LEFT, RIGHT, TOP, BAR_HEIGHT, DEPTH_HEIGHT = 60, 20, 40, 260, 200
GAP, BOTTOM, LEGEND_LINE = 70, 40, 18
BAR, LEAST_WIDTH = 14, 640


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
    def acceptance(self) -> list[float | None]: ...
    @property
    def lossless(self) -> bool: ...


@dataclass(frozen=True)
class _Bars:
    """Speeds of every category: {name of the bar: tokens per second}."""

    categories: list[str]
    names: list[str]
    speeds: dict[tuple[str, str], float]  # by category and name


def svg(rows: Sequence[SpeedRow], title: str) -> str:
    """The document: above, a group of bars for each category; below, a line for each lane that verified drafts."""
    bars = _bars(rows)
    group = (len(bars.names) + 1) * BAR
    width = max(LEAST_WIDTH, LEFT + RIGHT + group * len(bars.categories))
    lines = [
        row for row in rows if any(value is not None for value in row.acceptance) and _is_whole(row, rows)
    ]
    bottom = TOP + BAR_HEIGHT + GAP + (DEPTH_HEIGHT + GAP if lines else 0)
    height = bottom + LEGEND_LINE * len(bars.names) + 10
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif" '
        f'font-size="12" fill="#333">',
        f'<rect width="{width}" height="{height}" fill="white"/>',
        f'<text x="{LEFT}" y="20" font-size="14">{escaped(title)}</text>',
        *_bar_chart(bars, width, group),
    ]
    if lines:
        parts += _depth_chart(lines, bars.names, width, TOP + BAR_HEIGHT + GAP)
    for index, name in enumerate(bars.names):
        y = bottom + LEGEND_LINE * index
        parts.append(f'<rect x="{LEFT}" y="{y - 10}" width="12" height="12" fill="{_colour(index)}"/>')
        parts.append(f'<text x="{LEFT + 18}" y="{y}">{escaped(name)}</text>')
    return "\n".join([*parts, "</svg>", ""])


def _bars(rows: Sequence[SpeedRow]) -> _Bars:
    categories = list(dict.fromkeys(row.category for row in rows))
    speeds: dict[tuple[str, str], float] = {}
    names = ["without (plain)"]
    for row in rows:
        speeds[row.category, names[0]] = row.plain_tokens_per_second
        if row.lane == "plain":
            continue
        name = row.lane + ("" if row.lossless else " (lossy)")
        if name not in names:
            names.append(name)
        speeds[row.category, name] = row.tokens_per_second
    return _Bars(categories, names, speeds)


def _is_whole(row: SpeedRow, rows: Sequence[SpeedRow]) -> bool:
    """Over all categories: the last row of its lane."""
    return row is [other for other in rows if other.lane == row.lane][-1]


def _bar_chart(bars: _Bars, width: int, group: int) -> list[str]:
    most = max([*bars.speeds.values(), 1e-9]) * 1.1
    floor = TOP + BAR_HEIGHT
    parts = _scale(width, TOP, BAR_HEIGHT, most, "tokens per second")
    for column, category in enumerate(bars.categories):
        left = LEFT + column * group + BAR / 2
        for index, name in enumerate(bars.names):
            speed = bars.speeds.get((category, name))
            if speed is None:
                continue
            size = speed / most * BAR_HEIGHT
            parts.append(
                f'<rect class="bar" x="{left + index * BAR:.1f}" y="{floor - size:.1f}" width="{BAR - 2}" '
                f'height="{size:.1f}" fill="{_colour(index)}"><title>{escaped(category)}, {escaped(name)}: '
                f"{speed:.1f} tok/s</title></rect>"
            )
        x = left + len(bars.names) * BAR / 2
        parts.append(
            f'<text transform="translate({x:.1f},{floor + 14}) rotate(30)" font-size="11">{escaped(category)}</text>'
        )
    return parts


def _depth_chart(rows: Sequence[SpeedRow], names: Sequence[str], width: int, top: int) -> list[str]:
    depths = max(len(row.acceptance) for row in rows)
    parts = _scale(width, top, DEPTH_HEIGHT, 1.0, "acceptance by depth of the draft")
    step = (width - LEFT - RIGHT) / (depths + 1)
    for depth in range(1, depths + 1):
        x = LEFT + depth * step
        parts.append(f'<text x="{x:.1f}" y="{top + DEPTH_HEIGHT + 16}" text-anchor="middle">{depth}</text>')
    for row in rows:
        colour = _colour(names.index(row.lane) if row.lane in names else 0)
        points = [
            (LEFT + depth * step, top + DEPTH_HEIGHT - value * DEPTH_HEIGHT)
            for depth, value in enumerate(row.acceptance, start=1)
            if value is not None
        ]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>')
        parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.5" fill="{colour}"/>' for x, y in points]
    return parts


def _scale(width: int, top: int, height: int, most: float, label: str) -> list[str]:
    parts = [f'<text x="{LEFT}" y="{top - 6}">{label}</text>']
    for fifth in range(6):
        y, value = top + height - fifth / 5 * height, most * fifth / 5
        parts.append(f'<line x1="{LEFT}" x2="{width - RIGHT}" y1="{y:.1f}" y2="{y:.1f}" stroke="#ddd"/>')
        parts.append(f'<text x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{value:.3g}</text>')
    return parts


def _colour(index: int) -> str:
    return COLOURS[index % len(COLOURS)]


def escaped(text: str) -> str:
    """Text as it stands in an SVG document."""
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;").replace('"', "&quot;")
