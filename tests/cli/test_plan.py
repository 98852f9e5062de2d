"""Proves that `mtp-mlx plan` labels all that it prints a projection, with its source, and refuses clearly."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

import mtp_mlx.cli as cli
from mtp_mlx import hub
from mtp_mlx.adapter_folder import Header, write_header
from tests.stand_in_hub import StandIn


def run(*args: str) -> Result:
    return CliRunner().invoke(cli.main, ["plan", *args])


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    (tmp_path / "adapter").mkdir()
    write_header(tmp_path / "adapter", Header("mask-tokens", "tiny", None, acceptance=[0.9, 0.8]))
    return tmp_path / "adapter"


def test_text(adapter: Path) -> None:
    result = run("--curve", "m5-max", "--adapter", str(adapter))
    assert result.exit_code == 0, result.output
    assert "m5-max: projection, not a measurement" in result.stdout and "(projected)" in result.stdout
    assert "https://github.com/ml-explore/mlx/pull/3791" in result.stdout and str(adapter) in result.stdout
    assert "Best projected: " in result.stdout


def test_the_bundled_heads_are_known_by_their_name() -> None:
    result = run("--curve", "m5-max", "--adapter", "demo-heads")
    assert result.exit_code == 0 and "smollm2-135m-heads" in result.stdout, result.output


def test_an_adapter_on_the_hub(tmp_path: Path, adapter: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in = StandIn(tmp_path / "hub")
    monkeypatch.setattr(hub, "hub_api", lambda: stand_in)
    shutil.copytree(adapter, stand_in.remote / "maker" / "adapter")
    result = run("--curve", "m5-max", "--adapter", "maker/adapter", "--json")
    assert result.exit_code == 0 and json.loads(result.stdout)["plans"][0]["acceptance"] == [0.9, 0.8]
    result = run("--adapter", "maker/nothing")
    assert result.exit_code == 2 and "there is no such repository" in result.stderr


def test_json_and_all_curves(adapter: Path) -> None:
    result = run("--adapter", str(adapter), "--json", "--draft-cost", "0.1")
    report = json.loads(result.stdout)
    assert report["label"] == "projection, not a measurement" and report["draft_cost"] == 0.1
    assert [plan["curve"] for plan in report["plans"]] == ["m3-ultra", "m4-pro", "m5-max"]
    for plan in report["plans"]:
        assert plan["source"].startswith("https://") and plan["acceptance"] == [0.9, 0.8]
        assert {p["label"] for p in plan["projections"]} == {"projection, not a measurement"}
        assert plan["best"]["low"] == max(p["low"] for p in plan["projections"] if p["low"])


def test_categories_of_a_report(tmp_path: Path) -> None:
    rows = [{"lane": "linear", "category": c, "acceptance": [a]} for c, a in (("math", 0.9), ("chat", 0.01))]
    (tmp_path / "report.json").write_text(json.dumps({"rows": rows}))
    result = run("--curve", "m5-max", "--bench", str(tmp_path / "report.json"))
    assert "math" in result.stdout and "plain is best" in result.stdout


def test_nothing_beats_plain_is_said(adapter: Path) -> None:
    write_header(adapter, Header("mask-tokens", "tiny", None, acceptance=[0.01]))
    assert (
        "Nothing is projected to beat plain decoding here."
        in run("--curve", "m5-max", "-a", str(adapter)).stdout
    )


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--curve", "m9"], "choose one of m3-ultra, m4-pro, m5-max"),
        (["--curve", "~nosuchuser/x"], "no such home folder"),
        (["--adapter", "nowhere"], "nowhere is not an adapter folder"),
        (["--adapter", "a", "--bench", "b"], "give one of them"),
        (["--lane", "x"], "give the report with --bench"),
        (["--bench", "none.json"], "none.json does not exist"),
        (["--draft-cost", "-1"], "--draft-cost must be at least 0"),
    ],
)
def test_errors_are_one_sentence(args: list[str], message: str) -> None:
    result = run(*args)
    assert result.exit_code == 2 and message in result.stderr and result.stdout == "", result.output
