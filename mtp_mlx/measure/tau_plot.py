"""The curve of a tau sweep as an SVG file, written by hand: no plotting library is needed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from mtp_mlx.measure.tau_sweep import TauRow

WIDTH, HEIGHT = 640, 400
LEFT, RIGHT, TOP, BOTTOM = 60, 20, 40, 50
SERIES: tuple[tuple[str, str, Callable[[TauRow], float | None]], ...] = (
    ("agreement with the model's own path", "#1f77b4", lambda row: row.agreement),
    ("texts the same", "#7f7f7f", lambda row: row.same),
    ("answers right", "#d62728", lambda row: row.right),
)


@dataclass(frozen=True)
class _Axes:
    """Where values lie on the page: x from 1 to `most` tokens per pass, y from 0 to 1."""

    most: float

    def x(self, tokens_per_pass: float) -> float:
        return LEFT + (tokens_per_pass - 1) / (self.most - 1) * (WIDTH - LEFT - RIGHT)

    def y(self, share: float) -> float:
        return HEIGHT - BOTTOM - share * (HEIGHT - TOP - BOTTOM)


def svg(rows: Sequence[TauRow], title: str) -> str:
    """The document: tokens per pass to the right, shares upwards; a point for every tau, one for plain decoding."""
    axes = _Axes(max(1.5, *(row.tokens_per_pass for row in rows)) * 1.05)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" '
        f'font-size="12" fill="#333">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
        f'<text x="{LEFT}" y="20" font-size="14">{_escaped(title)}</text>',
        *_grid(axes),
    ]
    for place, (name, colour, value) in enumerate(SERIES):
        points = [(row, share) for row in rows if (share := value(row)) is not None]
        if points:
            parts += _line(axes, points, colour, labelled=place == 0)
            y = HEIGHT - BOTTOM - 46 + 16 * place
            parts.append(f'<text x="{LEFT + 10}" y="{y}" fill="{colour}">{_escaped(name)}</text>')
    return "\n".join([*parts, "</svg>", ""])


def _grid(axes: _Axes) -> list[str]:
    lines = []
    for tenth in range(0, 11, 2):
        y = axes.y(tenth / 10)
        lines.append(f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}" stroke="#ddd"/>')
        lines.append(f'<text x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{tenth * 10} %</text>')
    step = 0.5 if axes.most < 5 else 1.0
    tick = 1.0
    while tick <= axes.most:
        x, bottom = axes.x(tick), HEIGHT - BOTTOM
        lines.append(f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{bottom}" y2="{bottom + 5}" stroke="#333"/>')
        lines.append(f'<text x="{x:.1f}" y="{bottom + 18}" text-anchor="middle">{tick:g}</text>')
        tick += step
    middle = (LEFT + WIDTH - RIGHT) / 2
    lines.append(
        f'<text x="{middle:.0f}" y="{HEIGHT - 10}" text-anchor="middle">tokens per forward pass</text>'
    )
    return lines


def _line(axes: _Axes, points: Sequence[tuple[TauRow, float]], colour: str, labelled: bool) -> list[str]:
    places = [(axes.x(row.tokens_per_pass), axes.y(share)) for row, share in points]
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
    out = [f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>']
    for (row, _), (x, y) in zip(points, places, strict=True):
        out.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.5" fill="{colour}"/>')
        if labelled:
            label = "plain" if row.tau is None else f"{row.tau:g}"
            out.append(f'<text x="{x:.1f}" y="{y - 8:.1f}" text-anchor="middle">{label}</text>')
    return out


def _escaped(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
