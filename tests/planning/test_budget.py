"""The planner of `--layout auto`: no policy found by brute force beats it, and it knows when to stay plain."""

import itertools
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mtp_mlx.decode.layout import Layout
from mtp_mlx.decode.policy import Proposal
from mtp_mlx.decode.tree import DraftTree
from mtp_mlx.planning.budget import MARGIN, WIDTH, BudgetPolicy
from mtp_mlx.planning.cost import StepCost
from mtp_mlx.planning.experience import Experience
from mtp_mlx.planning.trials import LAST_TRIAL

ROWS = (1, 2, 3, 4, 6, 8, 12, 16, 24)
OTHER = 9  # a token that nobody drafts


def cost_of(
    per_row: float, per_slot: float = 0.0, draft: float = 0.0, steps_at: int | None = None
) -> StepCost:
    """A step of R rows costs 1 + per_row * (R - 1); twice that from `steps_at` rows."""
    seconds = tuple((1 + per_row * (r - 1)) * (2 if steps_at and r >= steps_at else 1) for r in ROWS)
    slots = (1, 2, 4, 8, 12, 20)
    surcharge = tuple(per_slot * count for count in slots)
    return StepCost(ROWS, (0, 1000), seconds, seconds, slots, surcharge, draft, (1.0, 1.0))


def slot_proposal(count: int) -> Proposal:
    return Proposal.chain("slots", [7] * count, [0.5] * count)


def observe(
    planner: BudgetPolicy, proposal: Proposal, layout: Layout, accepted: int, slower: float = 1.0
) -> None:
    """A step with `proposal` at hand, drafts of one token, that took `slower` times what the cost curve says."""
    planner.choose([proposal])
    predicted, _ = planner._correction._said(layout, planner._context)
    tokens = [*proposal.drafts[:accepted], OTHER]
    planner.observe(proposal, layout, tokens, slower * predicted)


def rate_of(policy: dict[int, Layout], acceptance: Sequence[float], cost: StepCost) -> float:
    """Exact long-run tokens per second of a stationary policy {drafts at hand: layout}."""
    states = len(policy)
    transition = np.zeros((states, states))
    tokens, seconds = np.zeros(states), np.zeros(states)
    for state, layout in policy.items():
        seconds[state] = cost.seconds(layout, 0)
        reach = np.cumprod([1.0, *acceptance[: layout.drafts]])
        exact = np.append(reach[:-1] - reach[1:], reach[-1])
        tokens[state] = 1 + np.sum(reach[1:])
        for accepted, probability in enumerate(exact):
            transition[state, layout.slots[accepted]] += probability
    distribution = np.zeros(states)
    distribution[0] = 1.0
    average = np.zeros(states)
    for _ in range(400):
        distribution = distribution @ transition
        average += distribution
    return float(average @ tokens / (average @ seconds))


def best_rate(slots: int, acceptance: Sequence[float], cost: StepCost) -> float:
    """Over every stationary policy."""
    actions = []
    for held in range(slots + 1):
        own = []
        for drafts in range(held + 1):
            own += [Layout(drafts, s) for s in itertools.product(range(slots + 1), repeat=drafts + 1)]
        actions.append(own)
    return max(rate_of(dict(enumerate(choice)), acceptance, cost) for choice in itertools.product(*actions))


@pytest.mark.parametrize("steps_at", [None, 3, 6])
@pytest.mark.parametrize("per_row", [0.02, 0.1, 0.3, 1.0])
@pytest.mark.parametrize("acceptance", [(0.9, 0.8), (0.5, 0.4), (0.2, 0.1)])
def test_no_stationary_policy_is_much_better(
    per_row: float, acceptance: tuple[float, float], steps_at: int | None
) -> None:
    cost = cost_of(per_row, draft=0.02, steps_at=steps_at)
    planner = BudgetPolicy(cost, 2, acceptance, "slots")
    planner.interrupts_plain = lambda: False  # type: ignore[method-assign]
    chosen = {held: planner.choose([slot_proposal(held)])[1] for held in range(3)}
    assert rate_of(chosen, acceptance, cost) >= best_rate(2, acceptance, cost) / (MARGIN + 0.01)


def test_free_rows_and_sure_drafts_take_every_slot() -> None:
    planner = BudgetPolicy(cost_of(0.0), 4, [0.99] * 4, "slots")
    assert planner.choose([slot_proposal(0)])[1] == Layout(0, (4,), width=WIDTH)
    proposal, layout = planner.choose([slot_proposal(4)])
    assert layout.drafts == 4 and layout.slots[4] == 4 and proposal.source_of(0) == "slots"
    assert planner.rate > 3


def test_worthless_drafts_mean_plain_decoding() -> None:
    planner = BudgetPolicy(cost_of(0.1), 4, [0.01] * 4, "slots")
    assert planner.choose([slot_proposal(4)])[1] == Layout.plain()
    assert "plain" in planner.verdict


def test_it_stays_below_a_step_in_the_cost() -> None:
    cheap = BudgetPolicy(cost_of(0.01, steps_at=8), 4, [0.7] * 4, "slots")
    layout = cheap.choose([slot_proposal(4)])[1]
    assert 4 <= layout.rows <= 7  # interpolation starts to climb after 6 rows
    assert BudgetPolicy(cost_of(0.01), 4, [0.7] * 4, "slots").choose([slot_proposal(4)])[1].rows > 8


def test_rows_that_get_dear_behind_a_long_text_are_left_out_there() -> None:
    """The curve has rows that are free behind nothing and cost a step each behind 1000 tokens."""
    free, dear = cost_of(0.0), cost_of(1.0)
    planner = BudgetPolicy(replace(free, long=dear.short, plain=(1.0, 1.5)), 4, [0.9] * 4, "slots")
    assert planner.choose([slot_proposal(4)])[1].rows > 8
    planner.begin(4000)
    assert planner.choose([slot_proposal(0)])[1] == Layout.plain() and "does not pay" in planner.verdict
    planner.observe(slot_proposal(0), Layout.plain(), [OTHER], seconds=3.0)
    said = replace(free, long=dear.short, plain=(1.0, 1.5)).seconds(Layout.plain(), 4001)
    expected = planner._correction.seconds(Layout.plain(), 4001)
    assert expected == pytest.approx(said)  # the text is long, not the machine slow
    planner.begin(0)
    assert planner.choose([slot_proposal(4)])[1].rows > 8


def test_lookup_is_verified_when_slots_do_not_pay() -> None:
    planner = BudgetPolicy(cost_of(0.1, per_slot=1.0), 4, [0.3] * 4, "slots")
    lookup = Proposal.chain("lookup", [3] * 20, [1.0] * 20)
    proposal, layout = planner.choose([slot_proposal(0), lookup])
    assert proposal.source_of(0) == "lookup" and layout.drafts > 4


def test_lookup_that_keeps_failing_is_no_longer_submitted() -> None:
    planner = BudgetPolicy(cost_of(0.3), 0, [], "slots")
    lookup = Proposal.chain("lookup", [3] * 20, [0.5] * 20)
    assert planner.choose([slot_proposal(0), lookup])[1].drafts > 0
    for _ in range(60):
        observe(planner, lookup, Layout(8, (0,) * 9), 0)
    assert planner.choose([slot_proposal(0), lookup])[1] == Layout.plain()


def test_it_learns_that_slots_pay_and_tries_them_when_they_do_not() -> None:
    planner = BudgetPolicy(cost_of(0.05), 2, [0.01, 0.01], "slots")
    trials = []
    for step in range(20 * LAST_TRIAL):
        if planner.interrupts_plain():
            layout = planner.choose([slot_proposal(0)])[1]
            assert layout == Layout(0, (2,), width=WIDTH)
            trials.append(step)
            observe(planner, slot_proposal(2), Layout(2, (2, 0, 0)), 0)
        else:
            observe(planner, slot_proposal(0), Layout.plain(), 0)
    gaps = np.diff(trials)
    waits = gaps[gaps > 1]
    assert len(waits) >= 3 and waits[-1] > 3 * waits[0]  # asks ever more rarely
    for _ in range(60):
        observe(planner, slot_proposal(2), Layout(2, (2, 2, 2)), 2)
    assert planner.choose([slot_proposal(0)])[1] == Layout(0, (2,), width=WIDTH)


def test_a_curve_measured_in_a_slow_minute_heals() -> None:
    """The curve promises free rows. Plain steps are twice as quick as it says, steps with slots as it says."""
    planner = BudgetPolicy(cost_of(0.0), 4, [0.5] * 4, "slots")
    assert planner.choose([slot_proposal(0)])[1] != Layout.plain()
    for _ in range(30):
        held = 0
        for _ in range(2):  # the second step verifies the drafts of the first, of which one is right
            layout = planner.choose([slot_proposal(held)])[1]
            right = min(1, layout.drafts)
            observe(planner, slot_proposal(held), layout, right, slower=0.4 if layout.rows == 1 else 1.0)
            held = layout.slots[right]
        observe(planner, slot_proposal(0), Layout.plain(), 0, slower=0.4)
    assert planner.choose([slot_proposal(0)])[1] == Layout.plain()
    assert planner.verdict.startswith("drafting by slots does not pay")


def test_a_machine_that_is_slower_for_everything_changes_no_choice() -> None:
    planner, slow = (BudgetPolicy(cost_of(0.1), 4, [0.6] * 4, "slots") for _ in range(2))
    for _ in range(30):
        for layout in (Layout.plain(), Layout(0, (4,)), Layout(4, (4, 0, 0, 0, 0)), Layout(4, (4,) * 5)):
            observe(planner, slot_proposal(layout.drafts), layout, 0)
            observe(slow, slot_proposal(layout.drafts), layout, 0, slower=1.7)
    for held in range(5):
        assert planner.choose([slot_proposal(held)])[1] == slow.choose([slot_proposal(held)])[1]


@settings(max_examples=40, deadline=None)
@given(
    per_row=st.floats(0, 1),
    acceptance=st.lists(st.floats(0, 1), min_size=3, max_size=3),
    confidences=st.lists(st.floats(0, 1), max_size=3),
)
def test_every_choice_is_a_legal_layout(
    per_row: float, acceptance: list[float], confidences: list[float]
) -> None:
    planner = BudgetPolicy(cost_of(per_row), 3, acceptance, "slots")
    offered = Proposal.chain("slots", [1] * len(confidences), confidences)
    proposal, layout = planner.choose([offered])
    assert layout.drafts <= len(proposal.drafts) and max(layout.slots) <= 3


def branching(*chances: float) -> Proposal:
    """A likely draft and one that follows it, and likely siblings of both."""
    return Proposal("slots", DraftTree((1, 2, 3, 4), (-1, -1, 0, 0), chances))


def test_likely_siblings_are_verified_where_rows_are_cheap() -> None:
    proposal, layout = BudgetPolicy(cost_of(0.01), 2, [0.6] * 2, "slots").choose(
        [branching(0.5, 0.4, 0.5, 0.4)]
    )
    assert layout.parents == (-1, -1, 0, 0) and proposal.drafts == [1, 2, 3, 4] and layout.width == WIDTH
    proposal, layout = BudgetPolicy(cost_of(0.35), 2, [0.6] * 2, "slots").choose(
        [branching(0.8, 0.1, 0.8, 0.1)]
    )
    assert proposal.drafts in ([1], [1, 3]) and not layout.parents  # a row costs a third of a step


def test_sequences_that_verify_chains_get_chains() -> None:
    planner = BudgetPolicy(cost_of(0.01), 2, [0.6] * 2, "slots")
    planner.begin(0, branches=False)
    proposal, layout = planner.choose([branching(0.5, 0.4, 0.5, 0.4)])
    assert proposal.drafts == [1, 3] and not layout.parents and layout.width == 1


def test_drafts_of_two_drafters_share_a_tree() -> None:
    planner = BudgetPolicy(cost_of(0.01), 2, [0.5] * 2, "slots")
    lookup = Proposal.chain("lookup", [5, 6], [0.9, 0.9])
    proposal, layout = planner.choose([slot_proposal(2), lookup])
    assert {(proposal.source_of(node), token) for node, token in enumerate(proposal.drafts)} == {
        ("slots", 7),
        ("lookup", 5),
        ("lookup", 6),
    }
    assert len(layout.slots) == 1 + layout.drafts == 5


def test_time_is_worth_what_it_brings_in_this_text() -> None:
    """Where most tokens come for little, a row must bring more than where none do."""
    quick, slow = (BudgetPolicy(cost_of(0.1), 0, [], "slots") for _ in range(2))
    doubtful = Proposal.chain("lookup", [3, 4, 5], [0.6, 0.6, 0.6])
    for planner, tokens in ((quick, [1, 2, 3, 4, 5, 6, 7, 8]), (slow, [1])):
        planner.begin(0)
        for _ in range(30):
            planner.observe(slot_proposal(0), Layout.plain(), tokens, 1.0)
    counts = [planner.choose([slot_proposal(0), doubtful])[1].drafts for planner in (quick, slow)]
    assert counts[0] < counts[1]


def test_submitted_drafts_alone_teach_what_is_said_of_chances() -> None:
    """The drafts that a step verified, and none that were only at hand."""
    experience = Experience.fresh("slots", 3, [0.5])
    planner = BudgetPolicy(cost_of(0.1), 3, [0.5], "slots", experience)
    learnt: list[tuple[str, float, bool]] = []
    experience.recalibration.learn = lambda *case: learnt.append(case)  # type: ignore[method-assign]
    planner.choose([slot_proposal(3)])
    planner.observe(slot_proposal(3), Layout(2, (0, 0, 0)), [7, 7, OTHER], seconds=1.0)
    assert learnt == [("slots", 0.5, True), ("slots", 0.5, True)]
    planner.choose([slot_proposal(3)])
    planner.observe(slot_proposal(0), Layout.plain(), [OTHER], seconds=1.0)
    assert len(learnt) == 2
