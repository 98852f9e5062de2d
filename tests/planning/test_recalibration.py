"""What is said of submitted drafts becomes true in every bin of chances, and the order of drafts stays."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mtp_mlx.planning.agreement import chance_of, log_odds
from mtp_mlx.planning.recalibration import CHANCES, KNOTS, START, SURE, Recalibration

CASES = st.lists(st.tuples(st.floats(0.001, 0.999), st.booleans()), max_size=200)


def learnt_from(cases: list[tuple[float, bool]]) -> Recalibration:
    recalibration = Recalibration()
    for chance, right in cases:
        recalibration.learn("heads", chance, right)
    return recalibration


@given(st.floats(-15, log_odds(0.85)))
def test_nothing_changes_before_anything_is_learnt_or_for_another_drafter(odds: float) -> None:
    recalibration = learnt_from([(0.5, True)] * 20)
    said = Recalibration().chance("heads", odds)
    assert said == recalibration.chance("memory", odds) == pytest.approx(chance_of(odds))


@given(st.floats(log_odds(SURE), 15))
def test_sure_chances_are_said_to_be_less_sure_until_something_is_learnt(odds: float) -> None:
    assert chance_of(odds - 0.3) < Recalibration().chance("heads", odds) < chance_of(odds)


@given(CASES, st.integers(0, 40), st.lists(st.floats(-3, 3), min_size=2, max_size=40))
def test_likelier_drafts_stay_likelier(
    cases: list[tuple[float, bool]], crossing: int, odds: list[float]
) -> None:
    """Also where neighbours need their log-odds in the other order."""
    recalibration = learnt_from([*cases, *[(0.45, False), (0.55, True)] * crossing])
    said = [recalibration.chance("heads", value) for value in sorted(odds)]
    assert said == sorted(said) and all(0.0 < chance < 1.0 for chance in said)


@given(st.sampled_from(CHANCES), st.booleans())
def test_a_surprise_moves_its_own_chance_and_no_other_one_but_its_neighbours(
    chance: float, right: bool
) -> None:
    recalibration = learnt_from([(chance, right)])
    for knot, other in zip(START, CHANCES, strict=True):
        said = recalibration.chance("heads", knot)
        if other == chance:
            assert said > other if right else said < other
        else:
            assert said == pytest.approx(other)


def test_chances_that_are_wrong_in_one_bin_alone_become_true_there() -> None:
    """Drafts of log-odds for .35 to .75 are right as often as that, but those for .55 in 4 of 10 cases."""
    recalibration, generator = Recalibration(), random.Random(1)
    last: dict[float, list[tuple[float, bool]]] = {0.35: [], 0.55: [], 0.75: []}
    for _ in range(12000):
        told = generator.choice(list(last))
        said = recalibration.chance("heads", log_odds(told))
        right = generator.random() < (0.4 if told == 0.55 else told)
        recalibration.learn("heads", said, right)
        last[told].append((said, right))
    for cases in last.values():
        chances, hits = zip(*cases[-1500:], strict=True)
        assert sum(chances) / 1500 == pytest.approx(sum(hits) / 1500, abs=0.03)


def test_what_neighbours_keep_each_other_from_is_made_up_for_later() -> None:
    """Drafts of .45 are wrong too often and those of .55 right too often, so that their log-odds meet; then the other
    way round. As many are right in the end as was said, so nothing must be left of it.
    """
    recalibration = learnt_from([(0.45, False), (0.55, True)] * 11)
    assert recalibration.chance("heads", KNOTS[5]) < 0.45 and recalibration.chance("heads", KNOTS[6]) > 0.55
    for chance, right in [(0.45, True), (0.55, False)] * 9:
        recalibration.learn("heads", chance, right)
    for knot, chance in zip(START, CHANCES, strict=True):
        assert recalibration.chance("heads", knot) == pytest.approx(chance)
