"""Drafts that several drafters agree on, or that others speak against, have chances of their own."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mtp_mlx.decode.policy import Proposal
from mtp_mlx.decode.tree import DraftTree
from mtp_mlx.planning.agreement import (
    AGREED,
    ALONE,
    DISPUTED,
    LARGEST_ODDS,
    LEARNT_CASES,
    VARIANCES,
    Agreement,
    Kind,
    Regression,
    chance_of,
    kinds,
    log_odds,
    pooled,
    states,
)
from mtp_mlx.planning.experience import Experience
from mtp_mlx.planning.hindsight import Hindsight


def test_drafts_are_compared_by_the_text_before_them() -> None:
    """The third draft of the first proposal follows another token than that of the second, so nobody speaks of it."""
    one = Proposal("heads", DraftTree.chain([1, 2, 3], [0.5] * 3))
    two = Proposal("memory", DraftTree((1, 9, 3, 4), (-1, 0, 1, -1), (0.5,) * 4))
    assert states([one, two]) == [[AGREED, DISPUTED, ALONE], [AGREED, DISPUTED, ALONE, DISPUTED]]
    assert states([one]) == [[ALONE] * 3]
    assert states([one, Proposal("memory")]) == [[ALONE] * 3, []]
    assert kinds([one, two])[1] == [
        Kind("memory", AGREED, True),
        Kind("memory", DISPUTED, True),
        Kind("memory", ALONE, True),
        Kind("memory", DISPUTED, False),
    ]


def test_what_is_learnt_of_a_kind_moves_its_chances_alone() -> None:
    """Drafts of both chances are right in 9 of 10 cases."""
    agreement, generator = Agreement(), np.random.default_rng(2)
    agreed = Kind("heads", AGREED, True)
    others = [Kind("heads", ALONE, True), Kind("memory", AGREED, True), Kind("heads", AGREED, False)]
    before = [agreement.odds(kind, 0.5) for kind in others]
    assert before[0] == 0.5
    for step in range(4000):
        agreement.learn(agreed, log_odds((0.3, 0.6)[step % 2]), bool(generator.random() < 0.9))
    for told in (0.3, 0.6):
        assert chance_of(agreement.odds(agreed, log_odds(told))) == pytest.approx(0.9, abs=0.03)
    assert [agreement.odds(kind, 0.5) for kind in others] == before


def test_agreed_drafts_begin_likelier_than_disputed_ones() -> None:
    agreement = Agreement()
    found = [agreement.odds(Kind("heads", state, True), 0.0) for state in (AGREED, ALONE, DISPUTED)]
    assert found[0] > found[1] == 0.0 > found[2]


@given(st.lists(st.tuples(st.floats(-8, 8), st.booleans()), min_size=1, max_size=60), st.floats(-1e6, 1e6))
def test_a_regression_is_the_kalman_filter_in_matrices(cases: list[tuple[float, bool]], odds: float) -> None:
    """The same in numpy's matrices; nothing grows without bounds, whatever comes."""
    learnt = Regression(0.6)
    weights, variance = np.array([0.6, 1.0]), np.diag(VARIANCES)
    for value, right in cases:
        learnt.learn(value, right)
        row = np.array([1.0, value])
        said = 1 / (1 + np.exp(-np.clip(weights @ row, -LARGEST_ODDS, LARGEST_ODDS)))
        information = np.linalg.inv(variance) + said * (1 - said) * np.outer(row, row)
        variance = np.linalg.inv(information)
        weights = weights + variance @ row * (right - said)
        variance = variance * min(2 ** (1 / LEARNT_CASES), *(np.array(VARIANCES) / np.diag(variance)))
    assert learnt(1.5) == pytest.approx(np.clip(weights @ [1.0, 1.5], -LARGEST_ODDS, LARGEST_ODDS), abs=1e-6)
    assert 0.0 <= chance_of(learnt(odds)) <= 1.0


def test_a_regression_finds_offset_and_slope() -> None:
    generator, learnt = np.random.default_rng(4), Regression(0.0)
    for _ in range(20000):
        odds = generator.normal(0, 1.5)
        learnt.learn(odds, bool(generator.random() < chance_of(0.5 + 1.6 * odds)))
    assert learnt(0.0) == pytest.approx(0.5, abs=0.2)
    assert learnt(1.0) - learnt(0.0) == pytest.approx(1.6, abs=0.2)


def test_drafts_of_several_have_the_mean_of_their_log_odds() -> None:
    one, two = DraftTree.chain([1, 2], [0.5, 0.5]), DraftTree((1, 9), (-1, -1), (0.5, 0.5))
    assert pooled([one, two], [[1.0, 2.0], [-3.0, 0.5]]) == [[-1.0, 2.0], [-1.0, 0.5]]
    assert pooled([one], [[1.0, 2.0]]) == [[1.0, 2.0]]


def test_what_two_drafters_say_is_right_more_often_than_what_they_dispute() -> None:
    """Both say half. Where they agree they are right in 9 of 10 cases, and otherwise each in 1 of 10."""
    experience, generator = Experience.fresh("heads", 1, [0.5]), np.random.default_rng(5)
    agreeing = [Proposal.chain("heads", [1], [0.5]), Proposal.chain("memory", [1], [0.5])]
    disputing = [Proposal.chain("heads", [1], [0.5]), Proposal.chain("memory", [2], [0.5])]
    for _ in range(60):
        hindsight = Hindsight(experience)
        for _ in range(20):
            agree = generator.random() < 0.5
            hindsight.calibrated(agreeing if agree else disputing)
            right = 1 if agree else generator.choice([1, 2, 3], p=[0.1, 0.1, 0.8])
            hindsight.read([int(right if not agree or generator.random() < 0.9 else 3)])
    fresh = Hindsight(experience)
    together = [one.tree.chances[0] for one in fresh.calibrated(agreeing)]
    apart = [one.tree.chances[0] for one in fresh.calibrated(disputing)]
    assert together == pytest.approx([0.9, 0.9], abs=0.1)
    assert apart == pytest.approx([0.1, 0.1], abs=0.1)
