"""The common layout of a batch's steps: its rates, what it learns from, and what the options make of it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any
from unittest import mock

import numpy as np
import pytest

from mtp_mlx.decode.layout import Layout
from mtp_mlx.decode.pick import SamplingConfig
from mtp_mlx.decode.policy import FixedPolicy, Proposal
from mtp_mlx.errors import MTPError
from mtp_mlx.model.block import block_shape
from mtp_mlx.planning.cost import StepCost
from mtp_mlx.planning.experience import Experience
from mtp_mlx.serve.batch_plan import BatchDrafting, BatchPlan, batch_drafting
from tests.decode.fakes import PlainWatching, attached
from tests.drafters.heads.test_chain import model_with_heads
from tests.serve.test_batch import Text, expected, plan_for, together


def cost(rows_cost: float) -> StepCost:
    """A pass over R rows costs 1 + rows_cost * (R - 1)."""
    long = (1.0, 1.0 + rows_cost * 99)
    return StepCost((1, 100), (1, 64), long, long, (1,), (0.0,), 0.0, (1.0, 1.0))


def plan(rows_cost: float, prior: float = 0.8, **drafting: int) -> BatchPlan:
    count = max(drafting.values())
    return BatchPlan(
        BatchDrafting("auto", own="slots", **drafting),
        cost(rows_cost),
        Experience.fresh("slots", count, [prior] * count),
    )


def test_a_planned_batch_drafts_less_the_more_rows_cost() -> None:
    free = plan(0.0001, slots=4).choose([4, 4], [0, 0])
    assert max(free.slots) == 4
    dear = plan(0.6, slots=4).choose([4, 4], [0, 0])
    assert dear == Layout.plain()
    chains = [plan(0.05, chain=4).choose([4] * n, [0] * n).chain for n in (1, 4, 16)]
    assert chains[0] >= chains[1] >= chains[2] and chains[0] > chains[2]


def test_a_planned_batch_knows_how_long_its_texts_are() -> None:
    """Rows that are free behind short texts and dear behind long ones: the mean length decides."""
    short, long = (1.0, 1.0), (1.0, 60.0)
    dearer = StepCost((1, 100), (0, 1000), short, long, (1,), (0.0,), 0.0, (1.0, 1.0))
    found = BatchPlan(
        BatchDrafting("auto", slots=4, own="slots"), dearer, Experience.fresh("slots", 4, [0.8] * 4)
    )
    assert found.choose([4, 4], [10, 20]).slot_rows
    assert found.choose([4, 4, 4], [0, 4000, 2000]) == Layout.plain()


def test_a_batch_tells_its_planner_how_long_its_texts_are() -> None:
    """Prompts of different lengths; the pending token is not cached."""
    model = attached("llama")
    planned = plan_for("plain", 0, False)
    lengths: list[list[int]] = []
    choose = planned.choose

    def watched(at_hand: Any, contexts: Any) -> Layout:
        lengths.append(list(contexts))
        return choose(at_hand, contexts)

    cases = [Text((5,) * length, 3, SamplingConfig(), 0, None) for length in (9, 4)]
    with mock.patch.object(planned, "choose", watched):
        together(model, cases, planned, [FixedPolicy("plain", 0)] * 2, [[], []], False)
    assert lengths == [[8, 3], [9, 4], [10, 5]]


def test_a_text_that_leaves_a_batch_tells_its_own_planner_how_long_it_is() -> None:
    model, policies = attached("llama"), [PlainWatching(), PlainWatching()]
    cases = [Text((5, 9, 2), 8, SamplingConfig(), 0, None, alone) for alone in (3, None)]
    together(model, cases, plan_for("plain", 0, False), [*policies], [[], []], False)
    assert [policy.contexts for policy in policies] == [[5], []]


@pytest.mark.parametrize(
    ("n_sequences", "slots", "chance"), [(1, 2, 0.7), (3, 2, 0.7), (4, 4, 0.8), (16, 3, 0.9)]
)
def test_planned_rates_are_those_of_the_chain_of_states(n_sequences: int, slots: int, chance: float) -> None:
    """The linear layout's steady state, simulated as `Batch` decodes: sequences wait for each other."""
    found = plan(0.1, prior=chance, slots=slots)
    rng = np.random.default_rng(0)
    tokens = seconds = 0.0
    at_hand = np.zeros(n_sequences, dtype=int)
    for _ in range(40_000):
        layout = Layout.linear(int(at_hand.max()), slots)
        seconds += 1.0 + 0.1 * (n_sequences * layout.rows - 1)
        right = rng.random((n_sequences, slots)) < chance
        accepted = np.minimum(np.logical_and.accumulate(right, axis=1).sum(axis=1), at_hand)
        tokens += float((1 + accepted).mean())
        at_hand = np.array(layout.slots)[accepted]
    drafting = BatchDrafting("linear", slots=slots)
    assert found.rate(n_sequences, drafting) == pytest.approx(tokens / seconds, rel=0.02)


def test_planned_rates_count_rows_that_draft_nothing() -> None:
    found = BatchPlan(
        BatchDrafting("auto", slots=2, own="slots"),
        replace(cost(0.1), lead=1),
        Experience.fresh("slots", 2, [0.5] * 2),
    )
    rows = 3 * block_shape(2, (2, 2, 2), lead=1).rows
    expected = (1 + 0.5 + 0.25) / (1 + 0.1 * (rows - 1))
    assert found.rate(3, BatchDrafting("quadratic", slots=2)) == pytest.approx(expected)


def test_a_planned_batch_learns() -> None:
    found = plan(0.05, prior=0.9, slots=2)
    assert found.choose([2, 2], [0, 0]).slot_rows
    watching = found.hindsight()
    assert watching is not None
    for _ in range(400):
        watching.calibrated([Proposal.chain("slots", [1, 2], [0.5, 0.5])])
        watching.read([9])
    assert any(found.choose([2, 2], [0, 0]) == Layout.plain() for _ in range(64))


def test_a_batch_learns_from_drafts_that_it_does_not_verify() -> None:
    """The drafts of one text are all right, those of the other all wrong, and no pass verifies any."""
    model, experience = attached("llama"), Experience.fresh("slots", 2, [0.9, 0.9])
    planned = BatchPlan(BatchDrafting("linear", slots=2, own="slots"), experience=experience)
    cases = [Text((5, 9, 2), 12, SamplingConfig(), 0, acceptance) for acceptance in (1.0, 0.0)]
    truths = [[token.token for token in expected(model, text)] for text in cases]
    with mock.patch.object(planned, "choose", lambda at_hand, contexts: Layout.linear(0, 2)):
        together(model, cases, planned, [FixedPolicy("linear", 2) for _ in cases], truths, False)
    known = experience.of("slots")
    seen, right = known._seen.sum(axis=1), known._accepted.sum(axis=1)
    assert seen[:2] == pytest.approx([20, 9], abs=1.5)
    assert right[0] / seen[0] == pytest.approx(0.5, abs=0.02) and right[1] == seen[1]


def test_options_become_what_a_batch_drafts_with() -> None:
    slots, heads = attached("qwen3"), model_with_heads("qwen3", 2, 4)
    assert batch_drafting(slots, "quadratic", 2) == BatchDrafting("quadratic", slots=2, own="slots")
    both = BatchDrafting("linear", slots=4, lookup=4, own="slots")
    assert batch_drafting(slots, "linear", None, lookup=True) == both
    assert batch_drafting(heads, "auto", None) == BatchDrafting("auto", chain=4, own="heads")
    assert batch_drafting(slots, "plain", None) == BatchDrafting("plain")
    looked_up = BatchDrafting("linear", lookup=8, own="slots")
    assert batch_drafting(slots, "linear", None, drafter="lookup") == looked_up
    with pytest.raises(MTPError, match="unknown drafter"):
        batch_drafting(slots, "linear", None, drafter="magic")
