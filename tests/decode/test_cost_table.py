"""The cost table: interpolation, contexts, slot surcharge, and what happens to a stale or damaged file."""

from pathlib import Path

import pytest

from mtp_mlx.decode.cost import StepCost, interpolate, read_cost, save_cost
from mtp_mlx.decode.layout import Layout

COST = StepCost((1, 2, 4), (100, 300), (1.0, 1.5, 2.0), (2.0, 3.0, 5.0), (1, 4), (0.1, 0.7), 0.05, (0.9, 1.7))


def test_interpolation_is_exact_at_the_points_and_linear_between() -> None:
    assert [interpolate((1, 2, 4), (1.0, 1.5, 2.0), x) for x in (0, 1, 2, 3, 4, 6)] == [
        1,
        1,
        1.5,
        1.75,
        2,
        2.5,
    ]
    assert interpolate((1, 2), (3.0, 2.0), 9) == 2.0  # noise never makes more rows cheaper than measured
    with pytest.raises(ValueError):
        interpolate((), (), 1)


def test_a_layout_costs_its_rows_its_slots_its_drafts_and_its_context() -> None:
    assert COST.seconds(Layout.plain(), 100) == pytest.approx(0.9)
    assert COST.seconds(Layout.plain(), 200) == pytest.approx(1.3)
    assert COST.seconds(Layout(1, (0, 0)), 100) == pytest.approx(1.5)
    assert COST.seconds(Layout(1, (0, 0)), 300) == pytest.approx(3.0)
    assert COST.seconds(Layout(0, (1,)), 100) == pytest.approx(1.5 + 0.1 + 0.05)
    assert COST.seconds(Layout(1, (1, 1)), 100) == pytest.approx(2.0 + 0.3 + 0.05)


def test_a_file_is_read_back_for_its_own_key_only(tmp_path: Path) -> None:
    path = tmp_path / "cost.json"
    assert read_cost(path, {"a": "1"}) is None
    save_cost(path, COST, {"a": "1"})
    assert read_cost(path, {"a": "1"}) == COST
    assert read_cost(path, {"a": "2"}) is None
    path.write_text(path.read_text()[:40])
    assert read_cost(path, {"a": "1"}) is None
