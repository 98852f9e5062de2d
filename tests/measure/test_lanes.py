"""Bench: both sides are measured on the same ids, refusals count, summaries add up, and the CLI reports it."""

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from mtp_mlx.api import load
from mtp_mlx.cli import main
from mtp_mlx.decode.layout import Layout
from mtp_mlx.drafters.masks.folder import mask_header
from mtp_mlx.drafters.masks.folder import save as save_adapter
from mtp_mlx.drafters.masks.weights import MaskAdapterConfig, new_adapter
from mtp_mlx.measure import lanes
from mtp_mlx.measure.certificate import Comparison
from mtp_mlx.measure.lanes import Bench, Lane, Measurement, Timed
from mtp_mlx.measure.prompts import Prompt
from mtp_mlx.measure.speed_report import summarise
from mtp_mlx.model.fingerprint import base_fingerprint
from tests.tiny import save_tiny


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A tiny model folder and an untrained adapter for it."""
    import mlx_lm

    root = tmp_path_factory.mktemp("bench")
    save_tiny(root / "model", "llama", seed=3)
    model, _ = mlx_lm.load(str(root / "model"))
    shape = MaskAdapterConfig(slots=2, rank=2, sampler_width=16)
    save_adapter(
        root / "adapter", new_adapter(model, shape), mask_header(shape, "tiny", base_fingerprint(model))
    )
    return root / "model", root / "adapter"


def test_every_lane_gets_the_same_text_as_mlx_lm(
    folders: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MTP_MLX_CACHE", str(tmp_path))
    model, tokenizer = load(str(folders[0]), folders[1])
    lanes = [
        Lane("plain", "plain"),
        Lane("quadratic", "quadratic"),
        Lane("linear", "linear", 1),
        Lane("text", "linear", drafter="lookup"),
    ]
    bench = Bench(model, tokenizer, lanes, max_tokens=12)
    bench.warm_up()
    results = bench.run([Prompt("one two", "a"), Prompt("three", "b")])
    assert [m.lane.name for m in results] == ["plain", "quadratic", "linear", "text"] * 2
    assert all(m.comparison.identical or m.comparison.certified for m in results)
    rows = summarise(results)
    assert [(row.lane, row.category) for row in rows[:3]] == [
        ("plain", "a"),
        ("plain", "b"),
        ("plain", "all"),
    ]
    plain = rows[2]
    assert plain.tokens_per_step == 1 and plain.rows_per_step == 1 and plain.prompts == 2
    assert all(m.timed.stats.steps > 0 for m in results)


@pytest.mark.parametrize("exact", [False, True])
def test_exact_rows_need_no_certificate_and_get_none(
    folders: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, exact: bool
) -> None:
    """The same near-tie is excused without `exact` and refused with it."""
    model, tokenizer = load(str(folders[0]), folders[1], exact=exact)
    tie = Comparison(False, 3, 1, 2, 1e-5, 1e-3)
    monkeypatch.setattr(lanes, "compare", lambda *_: tie)
    (found,) = Bench(model, tokenizer, [Lane("quadratic", "quadratic")], 4).run([Prompt("one two", "a")])
    assert found.comparison.certified != exact and found.refused == exact


def measurement(speed: float, comparison: Comparison, category: str = "a") -> Measurement:
    timed = Timed([1] * 11, 10, 10 / speed)
    timed.stats.record(Layout(2, (0, 0, 0)), [0, 1], ["slots"] * 2)
    return Measurement(
        Prompt("x", category), Lane("auto", "auto"), timed, Timed([1] * 11, 10, 1.0), comparison
    )


def test_a_differing_text_is_counted_and_its_speed_is_not() -> None:
    same, tie = Comparison(True), Comparison(False, 3, 1, 2, 1e-5, 1e-3)
    different = Comparison(False, 3, 1, 2, 0.5, 1e-3)
    assert measurement(20.0, different).refused
    row = summarise([measurement(20.0, same), measurement(40.0, tie), measurement(900.0, different)])[0]
    assert row.speedup == pytest.approx(row.tokens_per_second / row.plain_tokens_per_second)
    assert row.tokens_per_second == pytest.approx(20 / 0.75) and row.mean_of_ratios == pytest.approx(3)
    assert (row.identical, row.certified, row.refused) == (1, 1, 1)
    assert row.acceptance == [1.0, 0.0] and row.tokens_per_step == 2


def test_the_command_prints_one_json_object(
    folders: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MTP_MLX_CACHE", str(tmp_path))
    arguments = [
        "bench",
        "-m",
        str(folders[0]),
        "--adapter",
        str(folders[1]),
        "--limit",
        "2",
        "--max-tokens",
        "8",
    ]
    result = CliRunner().invoke(main, [*arguments, "--layout", "quadratic", "--json"])
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout.strip().splitlines()[-1])
    assert report["rows"][-1]["prompts"] == 2 and report["mismatches"] == []
    refused = CliRunner().invoke(main, [*arguments, "--prompts", str(tmp_path / "none.jsonl")])
    assert refused.exit_code == 2 and "none.jsonl" in refused.stderr


def test_a_draft_model_s_report_is_planned_without_slots(
    folders: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MTP_MLX_CACHE", str(tmp_path))
    model = str(folders[0])
    drafting = ["--draft-model", model, "--num-draft-tokens", "2", "--layout", "linear"]
    result = CliRunner().invoke(main, ["bench", "-m", model, *drafting, "--limit", "1", "-n", "8", "--json"])
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout.strip().splitlines()[-1])
    assert (report["draft_model"], report["num_draft_tokens"], report["loop"]) == (model, 2, None)
    assert report["places_slots"] is False and report["rows"][0]["acceptance"] == [1.0, 1.0]
    (tmp_path / "report.json").write_text(json.dumps(report))
    plan = ["plan", "--curve", "m5-max", "--bench", str(tmp_path / "report.json"), "--json"]
    planned = json.loads(CliRunner().invoke(main, plan).stdout)["plans"][0]
    rows = [(one["layout"], one["drafts"], one["rows"]) for one in planned["projections"]]
    assert rows == [("linear", 1, 2), ("linear", 2, 3), ("auto", 2, None)], "drafts, and no slot rows"
