"""The cost table: interpolation, contexts, slot surcharge, and what happens to a stale or damaged file."""

from dataclasses import replace
from pathlib import Path

import pytest

from mtp_mlx.decode.layout import Layout
from mtp_mlx.model.block import block_shape
from mtp_mlx.planning import calibrate, timing
from mtp_mlx.planning.cost import StepCost, interpolate, read_cost, save_cost
from tests.drafters.ptp.ptp_fakes import ptp_attached

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


def test_what_was_not_measured_is_not_for_free() -> None:
    """A row that nothing is known of costs a step, a slot row twice as much as a real one, and drafting time too."""
    known = replace(COST, long=(), slot_rows=(), surcharge=(), draft=None, plain=(0.9,))
    assert known.seconds(Layout.plain(), 5000) == pytest.approx(0.9)
    assert known.seconds(Layout(1, (0, 0)), 5000) == pytest.approx(1.5)
    assert known.seconds(Layout(1, (1, 1)), 100) == pytest.approx(2.0 + 2 / 3 + 0.9 / 4)
    least = replace(known, rows=(1,), short=(1.0,), plain=())
    assert least.seconds(Layout.plain(), 100) == 1.0
    assert least.seconds(Layout(1, (0, 0)), 100) == 2.0
    assert least.seconds(Layout(1, (1, 1)), 100) == 4.0 + 2 + 0.25


@pytest.mark.parametrize("slots", [(0,), (3,), (0, 0, 2), (1, 1, 1, 1, 1), (2, 0, 4)])
def test_rows_are_those_of_the_pass(slots: tuple[int, ...]) -> None:
    """Slot groups of O-PTP start with a row that drafts nothing."""
    layout = Layout(len(slots) - 1, slots)
    for lead in (0, 1):
        assert replace(COST, lead=lead).rows_of(layout) == block_shape(layout.drafts, slots, lead).rows


def test_rows_that_draft_nothing_cost_as_much_as_others() -> None:
    cost = replace(COST, lead=1)
    assert cost.seconds(Layout(1, (1, 1)), 100) == pytest.approx(2.5 + 0.7 + 0.05)  # 6 rows, 4 of them slots
    assert cost.seconds(Layout(1, (0, 0)), 300) == COST.seconds(Layout(1, (0, 0)), 300)


def test_a_measurement_knows_the_rows_that_draft_nothing() -> None:
    """And one from before they were counted is not taken for it."""
    first, second = (ptp_attached("llama", variant, "bits") for variant in ("o", "c"))
    assert calibrate.cost_key(first)["lead"] == "1" and "lead" not in calibrate.cost_key(second)
    cost = calibrate.measure(first, 60.0)  # most of 4 slots behind a position, so 20 of them are 5 groups
    assert cost.lead == 1 and cost.slot_rows == (2, 3, 5, 10, 15, 25)
    assert calibrate.measure(second, 60.0).slot_rows == tuple(sorted(timing.SLOT_ROWS))


def test_a_file_is_read_back_for_its_own_key_only(tmp_path: Path) -> None:
    path = tmp_path / "cost.json"
    assert read_cost(path, {"a": "1"}) is None
    save_cost(path, COST, {"a": "1"})
    assert read_cost(path, {"a": "1"}) == COST
    assert read_cost(path, {"a": "2"}) is None
    save_cost(path, replace(COST, lead=1), {"a": "1"})
    read = read_cost(path, {"a": "1"})
    assert read == replace(COST, lead=1) and isinstance(read.lead, int)
    least = StepCost((1,), (1, 768), (1.0,), (), (), (), None, ())
    save_cost(path, least, {"a": "1"})
    assert read_cost(path, {"a": "1"}) == least
    path.write_text(path.read_text()[:40])
    assert read_cost(path, {"a": "1"}) is None
