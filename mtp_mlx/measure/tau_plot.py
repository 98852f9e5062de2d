"""The curve of a tau sweep as an SVG file: what tokens per pass cost."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from mtp_mlx.measure.plot import Panel, document, escaped
from mtp_mlx.measure.tau_sweep import TauRow

WIDTH, HEIGHT = 640, 400
LEFT, RIGHT, TOP, BOTTOM = 60, 20, 40, 50
SERIES: tuple[tuple[str, str, Callable[[TauRow], float | None]], ...] = (
    ("agreement with the model's own path", "#1f77b4", lambda row: row.agreement),
    ("texts the same", "#7f7f7f", lambda row: row.same),
    ("answers right", "#d62728", lambda row: row.right),
)


def svg(rows: Sequence[TauRow], title: str) -> str:
    """The document: x is tokens per pass, y a share; a point for every tau and one for plain decoding."""
    most = max(1.5, *(row.tokens_per_pass for row in rows)) * 1.05
    panel = Panel(LEFT, TOP, WIDTH - LEFT - RIGHT, HEIGHT - TOP - BOTTOM, (1, most), (0, 1))
    parts = _axes(panel)
    for place, (name, colour, value) in enumerate(SERIES):
        points = [(row, share) for row in rows if (share := value(row)) is not None]
        if points:
            parts += panel.line([(row.tokens_per_pass, share) for row, share in points], colour)
            parts += _labels(panel, points) if place == 0 else []
            y = panel.bottom - 46 + 16 * place
            parts.append(f'<text x="{LEFT + 10}" y="{y}" fill="{colour}">{escaped(name)}</text>')
    return document(WIDTH, HEIGHT, title, parts)


def _axes(panel: Panel) -> list[str]:
    parts = panel.y_grid((tenth / 10, f"{tenth * 10} %") for tenth in range(0, 11, 2))
    most = panel.across[1]
    step = 0.5 if most < 5 else 1.0
    tick = 1.0
    while tick <= most:
        x, bottom = panel.x(tick), panel.bottom
        parts.append(f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{bottom}" y2="{bottom + 5}" stroke="#333"/>')
        parts.append(panel.x_label(tick, 18))
        tick += step
    middle = (panel.left + panel.right) / 2
    parts.append(
        f'<text x="{middle:.0f}" y="{HEIGHT - 10}" text-anchor="middle">tokens per forward pass</text>'
    )
    return parts


def _labels(panel: Panel, points: Sequence[tuple[TauRow, float]]) -> list[str]:
    """The tau of each point, above it."""
    return [
        f'<text x="{panel.x(row.tokens_per_pass):.1f}" y="{panel.y(share) - 8:.1f}" text-anchor="middle">'
        f"{'plain' if row.tau is None else f'{row.tau:g}'}</text>"
        for row, share in points
    ]
