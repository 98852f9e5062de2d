"""Proves that projections are what a simulation of the layouts gives, and that none goes beyond its curve."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mtp_mlx.adapter_folder import Header, read_header, write_header
from mtp_mlx.drafters import registry
from mtp_mlx.drafters.heads.draft_heads import DraftHeads
from mtp_mlx.drafters.masks.weights import MaskAdapter
from mtp_mlx.drafters.ptp.weights import PTPAdapter
from mtp_mlx.errors import MTPError
from mtp_mlx.measure.curves import CostCurve, built_in, read_curve
from mtp_mlx.measure.projection import LABEL, Projection, best, project
from mtp_mlx.measure.recorded import from_adapter, from_report

ROWS = (1, 2, 3, 5, 8, 13, 25)
CURVE = CostCurve("c", "m", "o", "s", ROWS, (1, 1.1, 1.2, 1.5, 1.9, 2.6, 4), (1, 1.2, 1.5, 2, 2.6, 3.5, 6))


def simulated(layout: str, acceptance: list[float], costs: tuple[float, ...], draft_cost: float) -> float:
    """Tokens per plain step of time, step by step with a coin for every draft."""
    rng, k = np.random.default_rng(7), len(acceptance)
    held, tokens, time = 0, 0, 0.0
    for _ in range(20_000):
        accepted = 0
        while accepted < held and rng.random() < acceptance[accepted]:
            accepted += 1
        tokens += 1 + accepted
        rows = {"linear": 1 + held + k, "quadratic": (1 + held) * (1 + k), "chained": 1 + held}[layout]
        time += float(np.interp(rows, ROWS, costs)) + draft_cost * k
        held = (k if accepted == held else 0) if layout == "linear" else k
    return tokens / time


@pytest.mark.parametrize("layout", ["linear", "quadratic", "chained"])
@pytest.mark.parametrize("draft_cost", [0.0, 0.07])
def test_layouts_against_a_simulation(layout: str, draft_cost: float) -> None:
    acceptance, chained = [0.8, 0.6, 0.5], layout == "chained"
    name = "linear" if chained else layout  # as `generate --layout` has it
    found = [p for p in project(CURVE, acceptance, chained, draft_cost) if p.layout == name]
    assert [p.drafts for p in found] == [1, 2, 3]
    for projection in found:
        for value, costs in ((projection.low, CURVE.high), (projection.high, CURVE.low)):
            expected = simulated(layout, acceptance[: projection.drafts], costs, draft_cost)
            assert value == pytest.approx(expected, rel=0.02), projection


@given(st.lists(st.floats(0, 1), min_size=1, max_size=3), st.booleans())
@settings(max_examples=25, deadline=None)
def test_bounds(acceptance: list[float], chained: bool) -> None:
    """No layout writes more tokens per step than drafts + 1, and auto is as good as plain and as any fixed one."""
    *fixed, auto = project(CURVE, acceptance, chained)
    assert all(1 <= (p.tokens_per_step or 0) <= p.drafts + 1 + 1e-9 for p in fixed)
    assert all(p.low is not None and p.high is not None and p.low <= p.high for p in fixed)
    assert auto.layout == "auto" and auto.low is not None and auto.low >= 1 - 1e-9
    # The planner wants a margin of a tenth before it leaves plain decoding.
    assert auto.low * 1.1 >= max(p.low or 0 for p in fixed) - 1e-6


def test_nothing_beyond_the_curve() -> None:
    short = dataclasses.replace(CURVE, rows=ROWS[:4], low=CURVE.low[:4], high=CURVE.high[:4])  # up to 5 rows
    found = {(p.layout, p.drafts): p for p in project(short, [1.0] * 4, False)}
    assert found["linear", 2].low and found["quadratic", 1].low
    assert found["linear", 3].low is None and found["quadratic", 2].high is None
    assert found["linear", 3].rows == 7 and found["quadratic", 4].rows == 25
    # All drafts accepted: a step of 5 rows writes 3 tokens at most, so no plan can give more.
    assert (found["auto", 4].high or 9) <= 5 / short.low[0]
    assert short.cost(6) is None and short.cost(4) == pytest.approx((1.35, 1.75))


def test_best_is_judged_at_the_dearest() -> None:
    assert best(project(CURVE, [0.01], False)) is None
    risky = Projection("linear", 1, 3, 1.5, 0.9, 3.0)
    sure = Projection("quadratic", 1, 4, 1.5, 1.2, 1.2)
    assert best([risky, sure]) is sure and best([risky]) is None


# --- curves ---------------------------------------------------------------------------------------------------


def test_built_in_curves_have_a_source() -> None:
    curves = built_in()
    assert {"m3-ultra", "m4-pro", "m5-max"} <= curves.keys()
    for curve in curves.values():
        assert curve.source.startswith("https://") and curve.low[0] == curve.high[0] == 1
        assert curve.cost(1) == (1, 1) and curve.cost(curve.most_rows + 1) is None
    # Published: 170.8 ms for 8 rows over 75.9 for one; four shapes at 4 rows, the cheapest 1.14, the dearest 1.57.
    assert curves["m5-max"].cost(8) == pytest.approx((170.8 / 75.9,) * 2)
    assert curves["m4-pro"].cost(4) == pytest.approx((1.14, 1.57))


GOOD: dict[str, Any] = {"machine": "m", "of": "o", "source": "s", "rows": [1, 4], "cost": [2.0, 3.0]}


def test_a_file_of_one_s_own(tmp_path: Path) -> None:
    path = tmp_path / "mine.json"
    path.write_text(json.dumps(GOOD))
    curve = read_curve(str(path))
    assert curve.name == "mine" and curve.cost(4) == (1.5, 1.5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"source": None}, "needs the texts machine, of, source"),
        ({"rows": [2, 4]}, "begin with 1"),
        ({"rows": [1, 1]}, "must increase"),
        ({"rows": [1.0, 4]}, "whole numbers"),
        ({"cost": [1.0]}, "a positive number for each"),
        ({"cost": [1.0, -1]}, "a positive number for each"),
        ({"cost": [1.0, float("inf")]}, "a positive number for each"),
        ({"cost": [1.0, 10**400]}, "a positive number for each"),
        ({"cost": [1e-320, 1e90]}, "a positive number for each"),
        ({"rows": [1, 10**400]}, "at most 1000000"),
        ({"low": [1.0, 4.0], "high": [1.0, 3.0]}, "`low` must not be above"),
    ],
)
def test_damaged_curves_are_refused(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    (tmp_path / "c.json").write_text(json.dumps({**GOOD, **change}))
    with pytest.raises(MTPError, match=message):
        read_curve(str(tmp_path / "c.json"))


def test_an_unknown_curve_names_the_known(tmp_path: Path) -> None:
    with pytest.raises(MTPError, match="no cost curve 'm9': choose one of m3-ultra, m4-pro, m5-max"):
        read_curve("m9")
    for damaged in ("{", "[" * 100_000):
        (tmp_path / "c.json").write_text(damaged)
        with pytest.raises(MTPError, match="cannot be read as JSON"):
            read_curve(str(tmp_path / "c.json"))
        with pytest.raises(MTPError, match="cannot be read as JSON"):
            from_report(tmp_path / "c.json")
        (tmp_path / "mtp_config.json").write_text(damaged)
        with pytest.raises(MTPError, match="cannot be read"):
            from_adapter(tmp_path)
    for name, message in (
        ("~nosuchuser/x", "no such home folder"),
        ("x" * 300, "too long|no cost curve"),
        ("a\0", "character 0"),
    ):
        with pytest.raises(MTPError, match=message):
            read_curve(name)


# --- acceptance -----------------------------------------------------------------------------------------------


def write_report(path: Path, rows: list[dict[str, Any]], **more: Any) -> Path:
    path.write_text(json.dumps({"rows": rows, **more}))
    return path


def test_acceptance_of_a_report(tmp_path: Path) -> None:
    rows = [
        {"lane": "plain", "category": "all", "acceptance": []},
        {"lane": "auto", "category": "all", "acceptance": [0.9]},
        {"lane": "linear", "category": "math", "acceptance": [0.7, 0.6, None, 0.5]},
        {"lane": "linear", "category": "code", "acceptance": [None]},
        {"lane": "linear", "category": "all", "acceptance": [0.5]},
    ]
    path = write_report(tmp_path / "report.json", rows, method="mtp-heads")
    found = from_report(path)
    assert [(m.name, m.acceptance, m.chained) for m in found] == [
        ("math", (0.7, 0.6), True),
        ("all", (0.5,), True),
    ]
    assert [m.acceptance for m in from_report(path, "auto")] == [(0.9,)]
    with pytest.raises(MTPError, match="no lane 'plain' with acceptance: there is auto, linear"):
        from_report(path, "plain")
    with pytest.raises(MTPError, match="nothing was drafted"):
        from_report(write_report(tmp_path / "r.json", rows[:1]))
    (tmp_path / "r.json").write_text("[]")
    with pytest.raises(MTPError, match="no report"):
        from_report(tmp_path / "r.json")
    with pytest.raises(MTPError, match="mtp-mlx bench --json"):
        from_report(tmp_path / "none.json")


def test_acceptance_of_an_adapter(tmp_path: Path) -> None:
    write_header(tmp_path, Header("mtp-heads", "tiny", None, acceptance=[0.8, 0.7]))
    found = from_adapter(tmp_path)
    assert found.acceptance == (0.8, 0.7) and found.chained
    write_header(tmp_path, Header("mask-tokens", "tiny", None))
    with pytest.raises(MTPError, match="records no acceptance"):
        from_adapter(tmp_path)


def test_with_recurrent_state_slots_stand_behind_the_last_draft_only(tmp_path: Path) -> None:
    """In an adapter's folder, in a report, and in what is projected from either."""
    write_header(tmp_path, Header("mask-tokens", "tiny", None, acceptance=[0.8, 0.7], base_recurrent=True))
    assert read_header(tmp_path).base_recurrent and from_adapter(tmp_path).linear_only
    rows = [{"lane": "linear", "acceptance": [0.8, 0.7]}]
    assert from_report(write_report(tmp_path / "a.json", rows, linear_only=True))[0].linear_only
    assert not from_report(write_report(tmp_path / "b.json", rows, linear_only=False))[0].linear_only
    cheap = CostCurve("c", "m", "o", "s", (1, 25), (1, 1.2), (1, 1.2))  # where quadratic layouts win
    *fixed, auto = project(cheap, [0.8, 0.7], False, linear_only=True)
    *everything, best_auto = project(cheap, [0.8, 0.7], False)
    assert fixed == [one for one in everything if one.layout == "linear"] and auto.layout == "auto"
    assert max(one.low or 0 for one in fixed) - 0.01 < (auto.low or 0) < (best_auto.low or 0)


def test_reports_say_whether_drafts_needed_slots(tmp_path: Path) -> None:
    rows = [{"lane": "linear", "acceptance": [0.5]}]
    for more, chained in (
        ({"places_slots": True, "method": "mask-tokens"}, False),
        ({"places_slots": False, "method": None}, True),
        ({"places_slots": None, "method": None}, True),
        ({"method": "mask-tokens"}, False),
        ({"method": "ptp"}, False),
        ({}, False),
    ):
        (found,) = from_report(write_report(tmp_path / "r.json", rows, **more))
        assert found.chained == chained, more


def test_the_registry_agrees_with_the_speculators() -> None:
    for method, speculator in (("mask-tokens", MaskAdapter), ("ptp", PTPAdapter), ("mtp-heads", DraftHeads)):
        assert registry.is_chained(method) != speculator.places_slots
    assert not registry.is_chained("unheard of") and not registry.is_chained(None)


def test_every_projection_is_labelled() -> None:
    assert all(p.to_json()["label"] == LABEL for p in project(CURVE, [0.5, 0.5], False))
    assert "projection" in LABEL
