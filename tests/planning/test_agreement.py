"""Drafts that several drafters agree on, or that others speak against, have chances of their own."""

import numpy as np
import pytest

from mtp_mlx.decode.policy import Proposal
from mtp_mlx.decode.tree import DraftTree
from mtp_mlx.planning.agreement import AGREED, ALONE, DISPUTED, Agreement, log_odds, pooled, states
from mtp_mlx.planning.experience import Experience
from mtp_mlx.planning.hindsight import Hindsight


def test_drafts_are_compared_by_the_text_before_them() -> None:
    """The third draft of the first proposal follows another token than that of the second, so nobody speaks of it."""
    one = Proposal("heads", DraftTree.chain([1, 2, 3], [0.5] * 3))
    two = Proposal("memory", DraftTree((1, 9, 3, 4), (-1, 0, 1, -1), (0.5,) * 4))
    assert states([one, two]) == [[AGREED, DISPUTED, ALONE], [AGREED, DISPUTED, ALONE, DISPUTED]]
    assert states([one]) == [[ALONE] * 3]
    assert states([one, Proposal("memory")]) == [[ALONE] * 3, []]


def test_surprise_moves_the_chances_of_its_state_alone() -> None:
    """Drafts of both chances are right in 9 of 10 cases: at first what it is told, in the end what it has seen."""
    agreement = Agreement()
    assert agreement.chance("heads", AGREED, log_odds(0.3)) == pytest.approx(0.3)
    for step in range(4000):
        odds = log_odds((0.3, 0.6)[step % 2])
        agreement.learn("heads", AGREED, odds, 0.9 - agreement.chance("heads", AGREED, odds))
    for told in (0.3, 0.6):
        assert agreement.chance("heads", AGREED, log_odds(told)) == pytest.approx(0.9, abs=0.02)
    assert agreement.chance("heads", DISPUTED, 0.0) == agreement.chance("memory", AGREED, 0.0) == 0.5


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
