"""The correction of the cost curve: it converges to what steps take, by kind and rows, and shrugs off outliers."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mtp_mlx.decode.layout import Layout
from mtp_mlx.planning.cost import CostCorrection

PLAIN, DRAFTS, SLOTS = Layout.plain(), Layout(4, (0,) * 5), Layout(1, (4, 4))


def test_nothing_is_corrected_before_anything_was_seen() -> None:
    assert CostCorrection().factor(SLOTS) == 1.0


@given(factor=st.floats(0.2, 5.0), predicted=st.floats(1e-4, 10.0))
def test_it_converges_to_what_steps_take(factor: float, predicted: float) -> None:
    correction = CostCorrection()
    for _ in range(60):
        correction.observe(PLAIN, predicted, factor * predicted)
    assert correction.factor(PLAIN) == pytest.approx(factor, rel=0.1)


def test_plain_steps_correct_kinds_not_yet_seen_and_those_then_go_their_own_way() -> None:
    correction = CostCorrection()
    for _ in range(40):
        correction.observe(PLAIN, 1.0, 0.5)
    assert correction.factor(SLOTS) == pytest.approx(0.5, rel=0.1)
    for _ in range(12):
        correction.observe(SLOTS, 1.0, 2.0)
    assert correction.factor(SLOTS) > 1.5, "a dozen own observations outweigh forty of another kind"
    assert correction.factor(PLAIN) == pytest.approx(0.5, rel=0.15), "and plain keeps what it knows"


def test_rows_are_told_apart() -> None:
    correction = CostCorrection()
    for _ in range(30):
        correction.observe(DRAFTS, 1.0, 1.0)
        correction.observe(Layout(20, (0,) * 21), 1.0, 3.0)
    assert correction.factor(DRAFTS) == pytest.approx(1.0, rel=0.15)
    assert correction.factor(Layout(20, (0,) * 21)) == pytest.approx(3.0, rel=0.15)


def test_rows_that_draft_nothing_count() -> None:
    """With one at the start of each slot group, five groups of one and one group of nine make 15 rows alike."""
    correction, five, one = CostCorrection(lead=1), Layout(4, (1,) * 5), Layout(4, (9, 0, 0, 0, 0))
    for _ in range(30):
        correction.observe(Layout(2, (7, 0, 0)), 1.0, 1.0)  # 11 rows
        correction.observe(five, 1.0, 3.0)
    assert correction.factor(one) == correction.factor(five) == pytest.approx(3.0, rel=0.15)


def test_one_outlier_moves_little() -> None:
    correction = CostCorrection()
    for _ in range(20):
        correction.observe(PLAIN, 1.0, 1.0)
    correction.observe(PLAIN, 1.0, 1000.0)
    assert correction.factor(PLAIN) < 1.06


@pytest.mark.parametrize(("predicted", "seconds"), [(0.0, 1.0), (1.0, 0.0), (1.0, -1.0), (1.0, float("nan"))])
def test_times_must_be_positive(predicted: float, seconds: float) -> None:
    with pytest.raises(ValueError, match="must be positive"):
        CostCorrection().observe(PLAIN, predicted, seconds)


def test_plain_steps_that_overlap_take_turns_and_cost_their_mean() -> None:
    """The first of two waits for both passes, and the second for none."""
    correction = CostCorrection()
    for seconds in [1.9, 0.1] * 60:
        correction.observe(PLAIN, 1.0, seconds)
    assert correction.factor(PLAIN) == pytest.approx(1.0, abs=0.03)


def test_it_counts_the_steps_since_a_plain_one() -> None:
    correction, counts = CostCorrection(), []
    for layout in (DRAFTS, SLOTS, PLAIN, DRAFTS):
        correction.observe(layout, 1.0, 1.0)
        counts.append(correction.since_plain)
    assert counts == [1, 2, 0, 1]
