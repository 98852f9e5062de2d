"""Proves that `tune` measures every layout and drafter, and that only a same-text lane beyond noise wins."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

import mtp_mlx.cli as cli
from mtp_mlx.decode.layout import Layout
from mtp_mlx.drafters.masks.folder import mask_header
from mtp_mlx.drafters.masks.folder import save as save_adapter
from mtp_mlx.measure.certificate import Comparison
from mtp_mlx.measure.lanes import Bench, Lane, Measurement, Timed
from mtp_mlx.measure.prompts import Prompt
from mtp_mlx.measure.tune import MARGIN, candidates, choose, results
from mtp_mlx.model.attach import attach
from mtp_mlx.model.fingerprint import base_fingerprint
from tests.decode.fakes import random_adapter
from tests.drafters.heads.test_chain import model_with_heads
from tests.tiny import save_tiny, tiny_model, tiny_tokenizer

SAME, TIE = Comparison(True), Comparison(False, 3, 1, 2, 1e-5, 1e-3)
DIFFERENT = Comparison(False, 3, 1, 2, 0.5, 1e-3)


def measured(lane: Lane, speed: float, comparison: Comparison = SAME, reference: float = 10.0) -> Measurement:
    timed = Timed([1] * 11, 10, 10 / speed)
    timed.stats.record(Layout(1, (1, 1)), [0, 1], ["slots"])
    return Measurement(Prompt("x", "a"), lane, timed, Timed([1] * 11, 10, 10 / reference), comparison)


PLAIN, FAST, FASTER = (
    Lane("plain", "plain"),
    Lane("f", "linear", 2, drafter="slots"),
    Lane("g", "quadratic", 4),
)


def test_the_fastest_lane_of_the_same_text_wins() -> None:
    choice = choose([measured(PLAIN, 11.0), measured(FAST, 15.0, TIE), measured(FASTER, 20.0)])
    assert (choice.name, choice.layout, choice.drafts, choice.drafter) == ("g", "quadratic", 4, None)
    assert choice.tokens_per_second == pytest.approx(20) and choice.plain_tokens_per_second == pytest.approx(
        11
    )
    rows = results([measured(PLAIN, 11.0), measured(FAST, 15.0)])
    assert [row.lane for row in rows] == ["f", "plain"] and rows[0].speed_up == pytest.approx(15 / 11)


def test_a_lane_whose_text_differs_cannot_win() -> None:
    runs = [*(measured(lane, speed) for lane, speed in ((PLAIN, 10.0), (FAST, 15.0), (FASTER, 90.0)))]
    runs += [measured(PLAIN, 10.0), measured(FAST, 15.0), measured(FASTER, 90.0, DIFFERENT)]
    assert choose(runs).name == "f"
    assert [row.refused for row in results(runs)] == [1, 0, 0]


@pytest.mark.parametrize(("plain", "theirs"), [(10.0, 5.0), (5.0, 10.0)])
def test_what_is_within_noise_of_the_faster_plain_does_not_win(plain: float, theirs: float) -> None:
    slower = [
        measured(PLAIN, plain, reference=theirs),
        measured(FAST, 10 * (MARGIN - 0.01), reference=theirs),
    ]
    choice = choose(slower)
    assert choice.layout == "plain" and choice.tokens_per_second == pytest.approx(10)
    faster = measured(FAST, 10 * (MARGIN + 0.01), reference=theirs)
    assert choose([slower[0], faster]).name == "f"


def test_every_layout_and_drafter_is_a_candidate() -> None:
    base = tiny_model("llama", seed=3)
    lanes = candidates(attach(base, random_adapter(base)))
    names = [(lane.layout, lane.drafts, lane.drafter) for lane in lanes]
    assert len({(*name, lane.rows) for name, lane in zip(names, lanes, strict=True)}) == len(names)
    trees = [(lane.drafts, lane.drafter, lane.rows) for lane in lanes if lane.layout == "tree"]
    assert trees == [(4, "slots,lookup", 8), (4, "slots,lookup", 16)]
    for layout in ("linear", "quadratic"):
        assert {(layout, count, "slots") for count in (1, 2, 4)} <= set(names)
        assert (layout, 4, "slots,lookup") in names
    assert {("auto", None, drafter) for drafter in ("slots", "slots,lookup", "lookup")} <= set(names)
    assert ("plain", None, None) in names and ("linear", 8, "lookup") in names
    bare = candidates(attach(tiny_model("llama", seed=3)))
    assert [lane.drafter for lane in bare] == [None, "lookup", "lookup"]


@pytest.mark.parametrize("heads", [2, 0], ids=["heads", "no adapter"])
def test_every_lane_of_other_models_runs(heads: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MTP_MLX_CACHE", str(tmp_path))
    model = model_with_heads("llama", heads, 3) if heads else attach(tiny_model("llama", seed=3))
    lanes = candidates(model)
    found = {(lane.layout, lane.drafts, lane.drafter) for lane in lanes}
    if heads:
        assert {("linear", count, "heads") for count in (1, 2, 3)} <= found
        assert ("linear", 3, "heads,lookup") in found and ("auto", None, "heads,lookup") in found
        assert not any(lane.layout == "quadratic" for lane in lanes)
    runs = Bench(model, tiny_tokenizer(), lanes, 6).run([Prompt("one two one two", "a")])
    assert len(runs) == len(lanes) and {row.refused for row in results(runs)} == {0}
    assert choose(runs).name in {lane.name for lane in lanes}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("tune")
    save_tiny(root / "model", "llama", seed=3)
    model = tiny_model("llama", seed=3)
    adapter = random_adapter(model, slots=2)
    save_adapter(root / "adapter", adapter, mask_header(adapter.config, "tiny", base_fingerprint(model)))
    return root


def run(folder: Path, verb: str, *args: str) -> Result:
    options = ["-m", str(folder / "model"), "-a", str(folder / "adapter")]
    return CliRunner().invoke(cli.main, [verb, *options, *args])


def test_the_command_keeps_what_auto_then_uses(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MTP_MLX_CACHE", str(tmp_path))
    result = run(folder, "tune", "--limit", "1", "-n", "8", "--json")
    assert result.exit_code == 0, result.output
    report: dict[str, Any] = json.loads(result.stdout)
    assert len(report["lanes"]) == 13 and {row["refused"] for row in report["lanes"]} == {0}
    assert report["beats_plain"] == (report["choice"]["layout"] != "plain")
    kept = json.loads(Path(report["kept_in"]).read_text())
    assert kept["choice"]["name"] == report["choice"]["name"] and len(kept["measured"]["lanes"]) == 13

    # What the machine's noise made fastest is not known here: from now on, it is this.
    kept["choice"] |= {"name": "linear 1 slots", "layout": "linear", "slots": 1, "drafter": "slots"}
    Path(report["kept_in"]).write_text(json.dumps(kept))
    said = run(folder, "generate", "-p", "the dog", "-n", "8")
    assert "auto" in said.stderr and "(tuned: linear 1 slots, " in said.stderr
    kept["choice"] |= {"name": "tree 8 rows", "layout": "tree", "rows": 8, "drafter": "slots,lookup"}
    Path(report["kept_in"]).write_text(json.dumps(kept))
    tree = run(folder, "generate", "-p", "the dog", "-n", "8")
    assert "(tuned: tree 8 rows, " in tree.stderr and tree.stdout == said.stdout
    asked = run(folder, "generate", "-p", "the dog", "-n", "8", "--drafter", "slots,lookup")
    assert "tuned" not in asked.stderr and asked.stdout == said.stdout

    assert "Record deleted" in run(folder, "tune", "--forget").stdout
    assert "There is no record" in run(folder, "tune", "--forget").stdout
    assert "tuned" not in run(folder, "generate", "-p", "the dog", "-n", "8").stderr


def test_the_table_and_the_verdict(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MTP_MLX_CACHE", str(tmp_path))
    result = run(folder, "tune", "--limit", "1", "-n", "8", "-a", "none")
    assert "every lane on this machine" in result.stdout and "auto lookup" in result.stdout
    assert ("Nothing beats plain decoding here" in result.stdout) != ("is fastest" in result.stdout)


def test_ctrl_c_keeps_nothing(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MTP_MLX_CACHE", str(tmp_path))

    def stopped(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("mtp_mlx.measure.lanes.Bench.run", stopped)
    result = run(folder, "tune", "--limit", "1", "-n", "8")
    assert result.exit_code == 130 and not (tmp_path / "tuned").exists()
