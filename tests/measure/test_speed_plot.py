"""Proves that the plot's bars and points stand for the figures they are drawn from."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from xml.etree import ElementTree

import pytest
from click.testing import CliRunner

import mtp_mlx.cli as cli
from mtp_mlx.measure.speed_plot import BAR_HEIGHT, COLOURS, DEPTH_HEIGHT, svg
from tests.tiny import save_tiny

SPACE = {"svg": "http://www.w3.org/2000/svg"}


@dataclass
class Row:
    lane: str
    category: str
    tokens_per_second: float
    plain_tokens_per_second: float = 10.0
    speedup: float | None = None
    mean_of_ratios: float | None = None
    acceptance: list[float | None] = field(default_factory=list)
    lossless: bool = True


ROWS = [
    Row("plain", "math", 10.0),
    Row("plain", "all", 10.0),
    Row("auto", "math", 20.0, acceptance=[0.9]),
    Row("auto", "all", 15.0, acceptance=[0.5, None, 0.25]),
    Row("static", "math", 30.0, lossless=False),
    Row("static", "all", 5.0, lossless=False),
]


def test_bars_are_speeds() -> None:
    root = ElementTree.fromstring(svg(ROWS, 'a <b> & "c"'))
    bars = root.findall("svg:rect[@class='bar']", SPACE)
    shown = [(bar.find("svg:title", SPACE), float(bar.get("height", 0)), bar.get("fill")) for bar in bars]
    speeds = {str(title.text): height for title, height, _ in shown if title is not None}
    assert list(speeds) == [
        f"{category}, {name}: {speed:.1f} tok/s"
        for category, own in (("math", (10, 20, 30)), ("all", (10, 15, 5)))
        for name, speed in zip(("without (plain)", "auto", "static (lossy)"), own, strict=True)
    ]
    for title, height in speeds.items():
        speed = float(title.split(": ")[1].split()[0])
        assert height == pytest.approx(speed / 33 * BAR_HEIGHT, abs=0.06), title
    assert [colour for *_, colour in shown] == [*COLOURS[:3]] * 2
    bottoms = {round(float(b.get("y", 0)) + float(b.get("height", 0)), 1) for b in bars}
    assert max(bottoms) - min(bottoms) < 0.2, "all stand on one floor"
    assert 'a <b> & "c"' in [text.text for text in root.findall("svg:text", SPACE)]


def test_points_are_acceptance_of_the_whole() -> None:
    root = ElementTree.fromstring(svg(ROWS, "t"))
    circles = root.findall("svg:circle", SPACE)
    assert len(circles) == 2 and {circle.get("fill") for circle in circles} == {COLOURS[1]}
    (x1, y1), (x3, y3) = ((float(c.get("cx", 0)), float(c.get("cy", 0))) for c in circles)
    assert y3 - y1 == pytest.approx(0.25 * DEPTH_HEIGHT, abs=0.1)
    texts = {t.text: float(t.get("x") or 0) for t in root.findall("svg:text", SPACE)}
    assert texts["1"] == pytest.approx(x1) and texts["3"] == pytest.approx(x3)


def test_without_drafts_there_is_no_second_chart() -> None:
    assert "acceptance by depth" not in svg(ROWS[:2], "t") and "acceptance by depth" in svg(ROWS, "t")


def test_bench_draws(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MTP_MLX_CACHE", str(tmp_path / "cache"))
    save_tiny(tmp_path / "model", "llama", seed=3)
    arguments = ["-m", str(tmp_path / "model"), "--adapter", "none", "--limit", "2", "--max-tokens", "4"]
    options = ["--layout", "plain", "--json", "--plot", str(tmp_path / "b.svg")]
    result = CliRunner().invoke(cli.main, ["bench", *arguments, *options])
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["method"] is None
    root = ElementTree.fromstring((tmp_path / "b.svg").read_text())
    assert len(root.findall("svg:rect[@class='bar']", SPACE)) >= 2
