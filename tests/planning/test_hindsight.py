"""Drafts are compared with the text that came to be, verified or not, also when it comes in several steps."""

import random

import pytest

from mtp_mlx.decode.policy import Proposal
from mtp_mlx.decode.tree import DraftTree
from mtp_mlx.planning.experience import Experience
from mtp_mlx.planning.grow import merged
from mtp_mlx.planning.hindsight import Hindsight

TREE = DraftTree((1, 2, 3, 4), (-1, -1, 0, 2), (0.6, 0.3, 0.5, 0.5))


def counted(experience: Experience) -> list[list[tuple[float, float]]]:
    """[(first choices, siblings)] of [(seen, right)] per depth of drafter "text"."""
    known = experience.of("text")
    pairs = [(round(s, 3), round(a, 3)) for s, a in zip(known._seen.sum(axis=1), known._accepted.sum(axis=1))]
    return [pairs[:3], pairs[known.max_depth : known.max_depth + 1]]


def offered(*trees: DraftTree) -> tuple[Experience, Hindsight]:
    experience = Experience.fresh("", 0, [])
    hindsight = Hindsight(experience)
    for tree in trees:
        hindsight.calibrated([Proposal("", DraftTree()), Proposal("text", tree)])
    return experience, hindsight


def test_drafts_that_nobody_verified_are_learnt_from_as_the_text_comes() -> None:
    experience, hindsight = offered(TREE)
    hindsight.read([1])
    assert counted(experience) == [[(1, 1), (0, 0), (0, 0)], [(1, 0)]]
    hindsight.read([3, 9])
    assert counted(experience) == [[(1, 1), (1, 1), (1, 0)], [(1, 0)]]
    hindsight.read([4])
    assert counted(experience)[0] == [(1, 1), (1, 1), (1, 0)]  # nothing waits any more


def test_drafts_behind_a_wrong_one_teach_nothing() -> None:
    experience, hindsight = offered(TREE)
    hindsight.read([2, 3, 4])
    assert counted(experience) == [[(1, 0), (0, 0), (0, 0)], [(1, 1)]]


def test_only_the_newest_drafts_for_a_place_count() -> None:
    experience, hindsight = offered(DraftTree.chain([8, 8], [0.5, 0.5]), TREE)
    hindsight.read([1])
    assert counted(experience)[0][0] == (1, 1)


def test_other_text_drops_what_waits() -> None:
    experience, hindsight = offered(TREE)
    hindsight.read([1])
    hindsight.forget()
    hindsight.read([3])
    assert counted(experience)[0][1] == (0, 0)


def test_a_text_that_goes_another_way_moves_the_chances_at_once() -> None:
    """In many texts the first draft was right in 6 of 10 cases; in this one it never is."""
    experience, hindsight = offered()
    for step in range(400):
        hindsight.calibrated([Proposal("text", TREE)])
        hindsight.read([1 if step % 10 < 6 else 9])
    here = Hindsight(experience)
    before = here.calibrated([Proposal("text", TREE)])[0].tree.chances[0]
    for _ in range(16):
        here.calibrated([Proposal("text", TREE)])
        here.read([9])
    after = here.calibrated([Proposal("text", TREE)])[0].tree.chances[0]
    elsewhere = Hindsight(experience).calibrated([Proposal("text", TREE)])[0].tree.chances[0]
    assert before == pytest.approx(0.6, abs=0.08)
    assert after < 0.35 and elsewhere > 0.5


def test_proposals_come_back_with_the_chances_of_experience() -> None:
    experience, hindsight = offered()
    for _ in range(300):
        (own, found) = hindsight.calibrated([Proposal("", DraftTree()), Proposal("text", TREE)])
        hindsight.read([2])
    assert own.tree == DraftTree() and found.tree.tokens == TREE.tokens
    assert found.tree.chances[0] < 0.1 and found.tree.chances[1] > 0.8


def test_submitted_drafts_teach_what_is_said_of_their_chances() -> None:
    """A path is followed as far as it is right; drafts behind a wrong one were never reached."""
    experience, hindsight = offered()
    learnt: list[tuple[str, float, bool]] = []
    experience.recalibration.learn = lambda *case: learnt.append(case)  # type: ignore[method-assign]
    merged = Proposal("text", TREE, ("text", "heads", "text", "heads"))
    hindsight.verified(merged, [1, 3, 9])
    assert learnt == [("text", 0.6, True), ("heads", 0.3, False), ("text", 0.5, True), ("heads", 0.5, False)]
    learnt.clear()
    hindsight.verified(merged, [7, 1])  # the second token follows 7, which nobody drafted
    assert learnt == [("text", 0.6, False), ("heads", 0.3, False)]


def test_said_chances_are_those_of_the_submitted_drafts() -> None:
    """All drafts are right in 6 of 10 cases, but the submitted ones, which the test picks, are right in 3 of 10."""
    experience, hindsight = offered()
    generator = random.Random(3)
    for step in range(1500):
        (known,) = hindsight.calibrated([Proposal("text", TREE.cut(1))])
        submitted = step % 2 == 0
        token = 1 if generator.random() < (0.3 if submitted else 0.9) else 9
        if submitted:
            hindsight.verified(known, [token])
        hindsight.read([token])
        hindsight.forget()
    assert Hindsight(experience).calibrated([Proposal("text", TREE.cut(1))])[0].tree.chances[0] < 0.4


def test_a_draft_of_two_drafters_has_the_chance_of_the_first_one() -> None:
    """It is submitted as the first one's, whose chances learn from it: so its chance must not be the other one's."""
    experience, hindsight = offered()
    for _ in range(60):
        experience.recalibration.learn("heads", 0.5, False)  # so heads are said to be worse
    heads, text = DraftTree((1, 5), (-1, -1), (0.5, 0.3)), DraftTree((1, 6), (-1, -1), (0.5, 0.3))
    first, second = hindsight.calibrated([Proposal("heads", heads), Proposal("text", text)])
    assert first.tree.chances[0] == second.tree.chances[0] < 0.45  # .55 without that
    both = merged([first, second])
    assert both.source_of(0) == "heads" and both.tree.chances[0] == first.tree.chances[0]


def test_the_spread_of_drafts_is_that_of_this_text() -> None:
    """What drafting is worth depends on it: a drafter that is never right here is given up here, not elsewhere."""
    experience, hindsight = offered()
    for _ in range(60):
        hindsight.calibrated([Proposal("text", TREE)])
        hindsight.read([1])
    here = Hindsight(experience)
    for _ in range(16):
        here.calibrated([Proposal("text", TREE)])
        here.read([9])
    (_, chance), (_, usual) = here.spread("text", 1)[0], Hindsight(experience).spread("text", 1)[0]
    assert chance < usual - 0.15
