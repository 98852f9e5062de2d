"""The parts of an SVG plot, written by hand: no plotting library is needed."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

TITLE_X, TITLE_Y = 60, 20


def document(width: float, height: float, title: str, parts: Iterable[str]) -> str:
    """A whole SVG file of this size in pixels: white ground, title, `parts`."""
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif" '
            f'font-size="12" fill="#333">',
            f'<rect width="{width}" height="{height}" fill="white"/>',
            f'<text x="{TITLE_X}" y="{TITLE_Y}" font-size="14">{escaped(title)}</text>',
            *parts,
            "</svg>",
            "",
        ]
    )


def escaped(text: str) -> str:
    """Text as it stands in an SVG document."""
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;").replace('"', "&quot;")


@dataclass(frozen=True)
class Panel:
    """A rectangle of the page with linear axes.

    Attributes:
        left, top, width, height: in pixels.
        across, up: (least, most) value of the x axis and of the y axis.
    """

    left: float
    top: float
    width: float
    height: float
    across: tuple[float, float]
    up: tuple[float, float]

    @property
    def right(self) -> float:
        """Pixels."""
        return self.left + self.width

    @property
    def bottom(self) -> float:
        """Pixels."""
        return self.top + self.height

    def x(self, value: float) -> float:
        """Pixels from the left edge of the page."""
        least, most = self.across
        return self.left + (value - least) / (most - least) * self.width

    def y(self, value: float) -> float:
        """Pixels from the upper edge of the page."""
        least, most = self.up
        return self.bottom - (value - least) / (most - least) * self.height

    def y_grid(self, labels: Iterable[tuple[float, str]]) -> list[str]:
        """A horizontal line at each value, with its label at the left."""
        out = []
        for value, label in labels:
            y = self.y(value)
            out.append(f'<line x1="{self.left}" x2="{self.right}" y1="{y:.1f}" y2="{y:.1f}" stroke="#ddd"/>')
            out.append(f'<text x="{self.left - 8}" y="{y + 4:.1f}" text-anchor="end">{label}</text>')
        return out

    def x_label(self, value: float, below: float) -> str:
        """A value of the x axis, its base line `below` pixels under the panel."""
        return (
            f'<text x="{self.x(value):.1f}" y="{self.bottom + below}" text-anchor="middle">{value:g}</text>'
        )

    def line(self, points: Sequence[tuple[float, float]], colour: str) -> list[str]:
        """A line through the points, with a dot on each."""
        places = [(self.x(x), self.y(y)) for x, y in points]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
        out = [f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>']
        out += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.5" fill="{colour}"/>' for x, y in places]
        return out
