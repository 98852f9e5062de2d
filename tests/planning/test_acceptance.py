"""`AcceptanceEstimate`: what counts, convergence, shrinkage, forgetting."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mtp_mlx.decode.tree import DraftTree
from mtp_mlx.planning.acceptance import DEFAULT_PRIOR, FLOOR, MOST_TOGETHER, AcceptanceEstimate


def chain(*confidences: float) -> DraftTree:
    return DraftTree.chain(range(len(confidences)), confidences)


def verified(estimate: AcceptanceEstimate, drafts: int, accepted: int, confidence: float = 0.5) -> None:
    """Learns from a chain of `drafts` drafts of which the first `accepted` are right."""
    for index in range(min(accepted + 1, drafts)):
        estimate.learn(index + 1, index < accepted, confidence)


def test_without_observations_the_prior_speaks() -> None:
    assert AcceptanceEstimate(3).summary() == pytest.approx([DEFAULT_PRIOR] * 3)
    assert AcceptanceEstimate(4, [0.7, 0.5]).summary() == pytest.approx([0.7, 0.5, 0.5, 0.5])
    assert AcceptanceEstimate(2, [0.7]).probability(1, 0.99) == pytest.approx(0.7)


def test_only_drafts_up_to_the_first_rejection_count() -> None:
    estimate = AcceptanceEstimate(4)
    verified(estimate, 4, 1)
    assert estimate.observations() == [1, 1, 0, 0]
    verified(estimate, 3, 3)
    np.testing.assert_allclose(estimate.observations(), [2, 2, 1, 0], atol=0.02)
    verified(estimate, 0, 0)
    np.testing.assert_allclose(estimate.observations(), [2, 2, 1, 0], atol=0.02)


def test_it_converges_to_conditional_acceptance_per_depth() -> None:
    generator = np.random.default_rng(0)
    truth = [0.8, 0.5, 0.9]
    estimate = AcceptanceEstimate(3, [0.1, 0.1, 0.1], memory=2000)
    for _ in range(6000):
        n_accepted = 0
        while n_accepted < 3 and generator.random() < truth[n_accepted]:
            n_accepted += 1
        verified(estimate, 3, n_accepted)
    np.testing.assert_allclose(estimate.summary(), truth, atol=0.04)


def test_confidence_refines_a_depth() -> None:
    generator = np.random.default_rng(1)
    estimate = AcceptanceEstimate(1, memory=2000)
    for _ in range(4000):
        confidence = generator.random()
        estimate.learn(1, generator.random() < confidence, confidence)
    for confidence, expected in [(0.15, 0.15), (0.45, 0.45), (0.99, 0.975)]:
        assert estimate.probability(1, confidence) == pytest.approx(expected, abs=0.05)
    assert estimate.probability(1) == pytest.approx(0.5, abs=0.04)


def test_a_thin_bin_stays_near_its_depth_and_a_thin_depth_near_its_prior() -> None:
    estimate = AcceptanceEstimate(2, [0.5, 0.5])
    for _ in range(100):
        estimate.learn(1, True, 0.9)
    depth = estimate.probability(1)
    assert depth > 0.9
    assert estimate.probability(1, 0.1) == pytest.approx(depth)
    estimate.learn(1, False, 0.1)
    assert depth - 0.1 < estimate.probability(1, 0.1) < depth
    assert estimate.probability(2) == pytest.approx(0.5)


def test_old_observations_are_forgotten() -> None:
    estimate = AcceptanceEstimate(1, memory=50)
    for _ in range(1000):
        estimate.learn(1, True, 0.5)
    for _ in range(200):
        estimate.learn(1, False, 0.5)
    assert estimate.probability(1) < 0.15
    estimate.fade(0.0)
    assert estimate.probability(1) == pytest.approx(DEFAULT_PRIOR)


@given(
    steps=st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5), st.floats(0, 1)), max_size=40),
    depth=st.integers(1, 7),
    confidence=st.none() | st.floats(0, 1),
)
def test_probabilities_stay_inside_and_one_more_acceptance_never_lowers_one(
    steps: list[tuple[int, int, float]], depth: int, confidence: float | None
) -> None:
    estimate = AcceptanceEstimate(4)
    for n_submitted, n_accepted, value in steps:
        verified(estimate, n_submitted, min(n_accepted, n_submitted), value)
    before = estimate.probability(depth, confidence)
    assert FLOOR <= before <= 1 - FLOOR
    n_drafts = min(depth, 4)
    verified(estimate, n_drafts, n_drafts, 0.5 if confidence is None else confidence)
    assert estimate.probability(depth, confidence) >= before - 1e-12


@pytest.mark.parametrize("arguments", [(0,), (2, [1.2]), (2, [-0.1])])
def test_bad_arguments_are_refused(arguments: tuple) -> None:
    with pytest.raises(ValueError, match=r"draft|acceptance"):
        AcceptanceEstimate(*arguments)
    estimate = AcceptanceEstimate(2)
    with pytest.raises(ValueError, match="from 1"):
        estimate.probability(0)


@pytest.mark.parametrize("scale", [1.0, 0.7])
def test_what_is_submitted_does_not_say_what_is_held(scale: float) -> None:
    """Drafts of which only the confident ones are verified: the estimate is of all that are at hand, also where the
    drafter is overconfident. Counting the verified ones only gives 0.8 (or 0.56) for a true 0.5 (or 0.35)."""
    estimate, generator = AcceptanceEstimate(1, [0.6], memory=1000), np.random.default_rng(3)
    for _ in range(4000):
        confidence = generator.random()
        estimate.offer(chain(confidence))
        if confidence > 0.6:
            estimate.learn(1, generator.random() < scale * confidence, confidence)
    assert estimate.probability(1) == pytest.approx(0.5 * scale, abs=0.05)
    assert estimate.probability(1, 0.3) == pytest.approx(0.3 * scale, abs=0.06)
    assert estimate.probability(1, 0.9) == pytest.approx(0.875 * scale, abs=0.08)


def test_the_prior_holds_until_something_is_observed() -> None:
    """Whatever the confidences of the first drafts, their mean acceptance is the recorded one."""
    estimate = AcceptanceEstimate(2, [0.5, 0.4])
    for confidences in ([0.9, 0.3], [0.5, 0.7], [0.7, 0.5]):
        estimate.offer(chain(*confidences))
    assert estimate.probability(1) == pytest.approx(0.5, abs=0.02)
    assert estimate.probability(2) == pytest.approx(0.4, abs=0.03)
    assert estimate.probability(1, 0.9) > estimate.probability(1, 0.5)


def test_deeper_drafts_count_by_the_chance_that_they_are_reached() -> None:
    estimate = AcceptanceEstimate(2, [0.5, 0.5])
    for _ in range(50):
        estimate.offer(chain(0.95, 0.9))  # the second is nearly always reached
        estimate.offer(chain(0.01, 0.1))  # and this one hardly ever
    drafts, sums = estimate._offered[1].sum(axis=0)
    assert sums / drafts > 0.85


def test_siblings_are_learnt_apart_from_first_choices() -> None:
    """The first choice is right in half of all cases, the second in a third; the drafter says half of both."""
    estimate, generator = AcceptanceEstimate(1, [0.5], memory=1000), np.random.default_rng(4)
    tree = DraftTree((5, 6), (-1, -1), (0.5, 0.5))
    for _ in range(2000):
        chances, right = estimate.offer(tree), generator.choice(3, p=[1 / 2, 1 / 3, 1 / 6])
        for node in (0, 1):
            estimate.learn(1, bool(right == node), 0.5, sibling=node == 1)
    assert chances == pytest.approx([1 / 2, 1 / 3], abs=0.06)


def test_drafts_of_one_place_are_not_surer_together_than_sure() -> None:
    estimate = AcceptanceEstimate(2, [0.9, 0.9])
    tree = DraftTree((5, 6, 7, 5), (-1, -1, 0, 1), (0.95, 0.9, 0.5, 0.8))
    chances = estimate.offer(tree)
    assert chances[0] + chances[1] <= MOST_TOGETHER + 1e-9 and chances[0] > chances[1] > 0.3


def test_the_spread_of_drafts_has_their_mean() -> None:
    """A draft in five is sure and nearly always right; the others are doubtful and nearly always wrong."""
    estimate = AcceptanceEstimate(2, [0.5], memory=1000)
    assert estimate.spread(1) == [(1.0, 0.5)]
    for step in range(500):
        sure = step % 5 == 0
        estimate.offer(chain(0.97 if sure else 0.07))
        estimate.learn(1, sure, 0.97 if sure else 0.07)
    spread = estimate.spread(1)
    assert [share for share, _ in spread] == pytest.approx([0.8, 0.2], abs=0.01)
    assert spread[0][1] < 0.05 and spread[1][1] > 0.9
    assert sum(share * chance for share, chance in spread) == pytest.approx(estimate.probability(1), abs=1e-3)
