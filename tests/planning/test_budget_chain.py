"""The planner for MTP heads: no policy found by brute force beats it, it knows when to stay plain, and it is used."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest

from mtp_mlx.decode.layout import Layout
from mtp_mlx.decode.policy import Proposal
from mtp_mlx.planning import calibrate
from mtp_mlx.planning.budget import MARGIN, PLAIN_EVERY, WIDTH, ChainBudgetPolicy
from mtp_mlx.planning.cost import StepCost
from mtp_mlx.planning.experience import Experience
from mtp_mlx.planning.trials import FIRST_TRIAL
from tests.drafters.heads.test_chain import model_with_heads
from tests.planning.test_budget import cost_of, observe


def heads_proposal(count: int) -> Proposal:
    return Proposal.chain("heads", [7] * count, [0.5] * count)


def rate_of(policy: Sequence[Layout], acceptance: Sequence[float], cost: StepCost) -> float:
    """Tokens per second of a stationary policy [drafts at hand] -> layout; a chain leaves as many as it is long."""
    held, tokens, seconds = 0, 0.0, 0.0
    for step in range(80):
        layout = policy[held]
        if step >= 20:  # it has come to its cycle
            tokens += np.cumprod([1.0, *acceptance[: layout.drafts]]).sum()
            seconds += cost.seconds(layout, 0)
        held = layout.chain
    return tokens / seconds


def best_rate(chain: int, acceptance: Sequence[float], cost: StepCost) -> float:
    """Over every stationary policy."""
    actions = [
        [Layout.chained(drafts, length) for drafts in range(held + 1) for length in range(chain + 1)]
        for held in range(chain + 1)
    ]
    return max(rate_of(choice, acceptance, cost) for choice in itertools.product(*actions))


@pytest.mark.parametrize("draft", [0.0, 0.05, 0.3, 1.0])
@pytest.mark.parametrize("per_row", [0.02, 0.3, 1.0])
@pytest.mark.parametrize("acceptance", [(0.9, 0.8), (0.5, 0.4), (0.2, 0.1)])
def test_no_stationary_policy_is_much_better(
    per_row: float, acceptance: tuple[float, float], draft: float
) -> None:
    cost = cost_of(per_row, draft=draft)
    planner = ChainBudgetPolicy(cost, 2, acceptance, "heads")
    chosen = [planner.choose([heads_proposal(held)])[1] for held in range(3)]
    assert rate_of(chosen, acceptance, cost) >= best_rate(2, acceptance, cost) / (MARGIN + 0.01)
    assert all(not layout.slot_rows for layout in chosen)


def wide(drafts: int, chain: int) -> Layout:
    """A chain after the pass, with the siblings that it may have."""
    return replace(Layout.chained(drafts, chain), width=WIDTH)


def test_free_and_sure_heads_are_all_used() -> None:
    planner = ChainBudgetPolicy(cost_of(0.0), 4, [0.99] * 4, "heads")
    assert planner.own_drafts == 4 and planner.choose([heads_proposal(0)])[1] == wide(0, 4)
    assert planner.choose([heads_proposal(4)])[1] == wide(4, 4)
    assert planner.rate > 4 and planner.verdict.startswith("drafting by heads expected to give")


def test_a_chain_is_no_longer_than_pays() -> None:
    """The last two heads are never right: each would cost its time and a row for nothing."""
    planner = ChainBudgetPolicy(cost_of(0.05, draft=0.05), 4, [0.9, 0.8, 0.01, 0.01], "heads")
    assert planner.choose([heads_proposal(2)])[1] == wide(2, 2)


def test_worthless_heads_mean_plain_decoding_and_are_tried_now_and_then() -> None:
    planner = ChainBudgetPolicy(cost_of(0.1, draft=0.1), 2, [0.01] * 2, "heads")
    assert planner.choose([heads_proposal(2)])[1] == Layout.plain()
    assert planner.verdict == "drafting by heads does not pay off here; plain unless drafts are near certain"
    for _ in range(FIRST_TRIAL):
        assert not planner.interrupts_plain()
        observe(planner, heads_proposal(0), Layout.plain(), 0)
    assert planner.interrupts_plain()
    assert planner.choose([heads_proposal(0)])[1] == wide(0, 2)


def test_it_learns_that_heads_are_right() -> None:
    planner = ChainBudgetPolicy(cost_of(0.1, draft=0.1), 2, [0.05] * 2, "heads")
    for _ in range(40):
        observe(planner, heads_proposal(2), Layout.chained(2, 2), 2)
    assert planner.choose([heads_proposal(0)])[1].chain == 2


def test_measured_costs_know_the_heads() -> None:
    """A chain's time is in the table, and tables of other heads are not taken for these."""
    two, three = model_with_heads("llama", 2, 2), model_with_heads("llama", 3, 3)
    assert calibrate.cost_key(two)["adapter"].startswith("2 heads, 2 drafts")
    assert calibrate.cost_key(two) != calibrate.cost_key(three)
    cost = calibrate.measure(two, 60.0)
    assert cost.draft is not None and cost.draft >= 0 and cost.surcharge == ()
    assert cost.seconds(Layout.chained(2, 2), 64) == pytest.approx(
        cost.seconds(Layout.chained(2, 0), 64) + 2 * cost.draft
    )


def test_heads_pay_by_their_sure_drafts() -> None:
    """Half of the drafts are right, and their confidence tells which: verifying the others loses what that wins.

    A step that verifies a draft takes 1.45 plain steps and another 1.05: 1.03 tokens per plain step if all drafts are
    verified, and 1.2 if the sure ones are.
    """
    planner = ChainBudgetPolicy(cost_of(0.4, draft=0.05), 1, [0.5], "heads")
    for step in range(200):
        sure = step % 2 == 0
        drafted = Proposal.chain("heads", [7], [0.97 if sure else 0.03])
        planner.choose([drafted])
        observe(planner, drafted, Layout.chained(1, 1), int(sure))
    observe(planner, heads_proposal(0), Layout.plain(), 0)
    value = {
        confidence: planner.choose([Proposal.chain("heads", [7], [confidence])])[1].drafts
        for confidence in (0.03, 0.97)
    }
    assert value == {0.03: 0, 0.97: 1}
    assert planner.rate > 1.15


def test_a_plain_step_is_seen_now_and_then() -> None:
    """What plain decoding costs is what all else is compared with, and a text that drafts well never shows it."""
    planner = ChainBudgetPolicy(cost_of(0.1, draft=0.05), 1, [0.95], "heads")
    for _ in range(PLAIN_EVERY):
        layout = planner.choose([heads_proposal(1)])[1]
        assert layout.chain
        observe(planner, heads_proposal(1), replace(layout, width=1), 1)
    assert planner.choose([heads_proposal(1)])[1] == Layout.plain()
    observe(planner, heads_proposal(0), Layout.plain(), 0)
    assert planner.choose([heads_proposal(1)])[1].chain


def test_a_drafter_that_first_reads_the_text_teaches_nothing_of_a_chain() -> None:
    """The heads run over 500 tokens before their first draft, and over few afterwards."""
    planner = ChainBudgetPolicy(cost_of(0.1, draft=0.05), 2, [0.5] * 2, "heads")
    planner.begin(500)
    layout = Layout.chained(0, 2)
    usual = planner._correction.seconds(layout, 500)
    observe(planner, heads_proposal(0), layout, 0, slower=1.9)
    assert planner._correction.seconds(layout, 501) == pytest.approx(usual)
    observe(planner, heads_proposal(0), layout, 0, slower=1.9)
    assert planner._correction.seconds(layout, 502) > 1.2 * usual


def test_heads_that_did_not_pay_are_tried_again_in_texts_shorter_than_the_wait() -> None:
    """And found to pay by now: every token is the one that they draft."""
    experience = Experience.fresh("heads", 1, [0.01])
    drafted = []
    for _ in range(40):
        planner = ChainBudgetPolicy(cost_of(0.1, draft=0.05), 1, [0.01], "heads", experience)
        planner.begin(10)
        held, chains = 0, 0
        for _ in range(FIRST_TRIAL // 3):
            proposal, layout = planner.choose([heads_proposal(held)])
            seconds = planner._correction.seconds(layout, planner._context)
            planner.observe(proposal, layout, [7] * (layout.drafts + 1), seconds)
            held, chains = layout.chain, chains + layout.chain
        drafted.append(chains)
    assert drafted[0] == drafted[1] == 0 < max(drafted[2:6]), "not in the first texts, but soon"
    assert min(drafted[-5:]) > FIRST_TRIAL // 3 - 3, "and then all the time"
