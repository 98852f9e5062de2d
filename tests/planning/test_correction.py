"""The correction of the cost curve: it converges to what steps take, by their parts, and shrugs off outliers."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mtp_mlx.decode.layout import Layout
from mtp_mlx.planning.correction import CostCorrection
from mtp_mlx.planning.cost import StepCost

PLAIN, DRAFTS, SLOTS = Layout.plain(), Layout(4, (0,) * 5), Layout(1, (4, 4))
SIZES = (1, 2, 3, 4, 6, 8, 12, 16, 24)


def curve(pace: float = 1.0, lead: int = 0, draft: float = 0.05, **off: float) -> StepCost:
    """A step of n rows takes `pace` times .9 + .1 n seconds, but those of `off` (r3=1.5) so many times that."""
    seconds = tuple(pace * (0.9 + 0.1 * rows) * off.get(f"r{rows}", 1.0) for rows in SIZES)
    return StepCost(SIZES, (1, 1000), seconds, (), (1, 24), (0.0, 0.0), draft, (pace,), lead)


def following(cost: StepCost) -> CostCorrection:
    found = CostCorrection()
    found.follow(cost)
    return found


def verified(drafts: int, chain: int = 0) -> Layout:
    return Layout.chained(drafts, chain)


def factor(correction: CostCorrection, layout: Layout, cost: StepCost | None = None) -> float:
    return correction.seconds(layout, 1) / (cost or curve()).seconds(layout, 1)


def test_nothing_is_corrected_before_anything_was_seen() -> None:
    for layout in (PLAIN, DRAFTS, SLOTS, verified(3, 2)):
        assert following(curve()).seconds(layout, 1) == curve().seconds(layout, 1)


@given(times=st.floats(0.4, 5.0), pace=st.floats(1e-4, 10.0))
def test_it_converges_to_what_steps_take(times: float, pace: float) -> None:
    correction = following(curve(pace))
    for _ in range(60):
        correction.observe(PLAIN, 1, times * pace)
    assert correction.seconds(PLAIN, 1) == pytest.approx(times * pace, rel=0.1)


def test_plain_steps_correct_kinds_not_yet_seen_and_those_then_go_their_own_way() -> None:
    correction, usual = following(curve()), curve().seconds(SLOTS, 1)
    for _ in range(40):
        correction.observe(PLAIN, 1, 0.5)
    assert 0.5 < factor(correction, SLOTS) < 0.7, "most of it is the machine's pace"
    for _ in range(12):
        correction.observe(SLOTS, 1, 2.0 * usual)
    assert factor(correction, SLOTS) > 1.5, "a dozen own observations outweigh forty of another kind"
    assert factor(correction, PLAIN) == pytest.approx(0.5, rel=0.15), "and plain keeps what it knows"


def test_rows_are_told_apart() -> None:
    correction, many = following(curve()), Layout(20, (0,) * 21)
    for _ in range(30):
        correction.observe(DRAFTS, 1, curve().seconds(DRAFTS, 1))
        correction.observe(many, 1, 3.0 * curve().seconds(many, 1))
    assert factor(correction, DRAFTS) == pytest.approx(1.0, rel=0.15)
    assert factor(correction, many) == pytest.approx(3.0, rel=0.15)


def test_a_size_measured_wrongly_is_put_right_by_steps_of_other_sizes() -> None:
    """Two rows were measured as 1.4 times too dear: three and four rows, and the pace, tell that they may not be."""
    wrong, right = curve(r2=1.4, r3=1.3, r4=1.3), curve()
    correction = following(wrong)
    for _ in range(30):
        for layout in (PLAIN, verified(2), verified(3)):
            correction.observe(layout, 1, right.seconds(layout, 1))
    two = verified(1)
    assert right.seconds(two, 1) * 0.95 < correction.seconds(two, 1) < wrong.seconds(two, 1) * 0.88


def test_what_rows_cost_is_learnt_with_a_chain_and_without() -> None:
    wrong, right = curve(r6=1.5, r8=1.5, draft=0.2), curve(draft=0.05)
    correction = following(wrong)
    for _ in range(30):
        for layout in (PLAIN, verified(6), verified(1, 2), verified(2, 1)):
            correction.observe(layout, 1, right.seconds(layout, 1))
    for layout in (verified(6, 2), verified(6, 1)):  # never seen together
        assert correction.seconds(layout, 1) == pytest.approx(right.seconds(layout, 1), rel=0.12)
        assert correction.seconds(layout, 1) < 0.75 * wrong.seconds(layout, 1)


def test_each_length_of_a_chain_has_its_own_price() -> None:
    """The first draft is free here and the second is not, which no price per draft can say."""
    correction, measured = following(curve(draft=0.1)), {1: 1.0, 2: 1.25}
    for _ in range(40):
        for chain, seconds in measured.items():
            correction.observe(verified(0, chain), 1, seconds)
    for chain, seconds in measured.items():
        assert correction.seconds(verified(0, chain), 1) == pytest.approx(seconds, rel=0.03)


def test_rows_that_draft_nothing_count() -> None:
    """With one at the start of each slot group, five groups of one and one group of nine make 15 rows alike."""
    cost = curve(lead=1)
    correction, five, one = following(cost), Layout(4, (1,) * 5), Layout(4, (9, 0, 0, 0, 0))
    for _ in range(30):
        correction.observe(Layout(2, (7, 0, 0)), 1, cost.seconds(Layout(2, (7, 0, 0)), 1))  # 11 rows
        correction.observe(five, 1, 3.0 * cost.seconds(five, 1))
    assert factor(correction, one, cost) == pytest.approx(factor(correction, five, cost))
    assert factor(correction, one, cost) == pytest.approx(3.0, rel=0.15)


def test_one_outlier_moves_little() -> None:
    correction = following(curve())
    for _ in range(20):
        correction.observe(PLAIN, 1, 1.0)
    correction.observe(PLAIN, 1, 1000.0)
    assert factor(correction, PLAIN) < 1.06


@pytest.mark.parametrize("seconds", [0.0, -1.0, float("nan")])
def test_times_must_be_positive(seconds: float) -> None:
    with pytest.raises(ValueError, match="must be positive"):
        following(curve()).observe(PLAIN, 1, seconds)


def test_plain_steps_that_overlap_take_turns_and_cost_their_mean() -> None:
    """The first of two waits for both passes, and the second for none."""
    correction = following(curve())
    for seconds in [1.9, 0.1] * 60:
        correction.observe(PLAIN, 1, seconds)
    assert factor(correction, PLAIN) == pytest.approx(1.0, abs=0.03)


def test_a_new_curve_starts_again_and_the_same_one_does_not() -> None:
    correction = following(curve())
    for _ in range(20):
        correction.observe(PLAIN, 1, 1.5)
    correction.follow(curve())
    assert correction.seconds(PLAIN, 1) == pytest.approx(1.5, rel=0.1)
    correction.follow(curve(pace=2.0))
    assert correction.seconds(PLAIN, 1) == 2.0


def test_steps_that_scatter_more_teach_less_each() -> None:
    generator, calm, wild = np.random.default_rng(3), following(curve()), following(curve())
    for _ in range(200):
        calm.observe(DRAFTS, 1, 1.4)
        wild.observe(DRAFTS, 1, float(1.4 * generator.uniform(0.2, 1.8)))
    before = calm.seconds(DRAFTS, 1), wild.seconds(DRAFTS, 1)
    assert before == (pytest.approx(1.4, rel=0.02), pytest.approx(1.4, rel=0.1))
    for correction in (calm, wild):
        correction.observe(DRAFTS, 1, 1.8)
    moved = calm.seconds(DRAFTS, 1) - before[0], wild.seconds(DRAFTS, 1) - before[1]
    assert moved[0] > 1.5 * moved[1] > 0


def test_it_counts_the_steps_since_a_plain_one() -> None:
    correction, counts = following(curve()), []
    for layout in (DRAFTS, SLOTS, PLAIN, DRAFTS):
        correction.observe(layout, 1, 1.0)
        counts.append(correction.since_plain)
    assert counts == [1, 2, 0, 1]
