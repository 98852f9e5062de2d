"""The tree of a step spends its rows where they are worth most, and joins what all drafters propose."""

from __future__ import annotations

from itertools import chain, combinations, product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mtp_mlx.decode.layout import Layout
from mtp_mlx.decode.policy import Proposal
from mtp_mlx.decode.tree import ROOT, DraftTree
from mtp_mlx.planning.grow import TreePolicy, merged, spend
from tests.decode.trees import random_parents


def worth_of(tree: DraftTree, nodes: tuple[int, ...], slots: tuple[int, ...], worth: list[float]) -> float:
    """Tokens that a step is expected to bring beside its own, and those that its slots bring the next one."""
    paths = tree.path_chances
    total = sum(paths[node] for node in nodes)
    for row, count in enumerate(slots):
        node = ROOT if row == 0 else nodes[row - 1]
        reached = 1.0 if row == 0 else paths[node]
        ends = reached - sum(paths[child] for child in nodes if tree.parents[child] == node)
        total += ends * sum(worth[:count])
    return total


def best_worth(tree: DraftTree, rows: int, worth: list[float], lead: int) -> float:
    """By trying everything."""
    best = 0.0
    every = range(len(tree))
    for nodes in chain.from_iterable(
        combinations(every, size) for size in range(min(len(tree), rows - 1) + 1)
    ):
        if any(tree.parents[node] not in (ROOT, *nodes) for node in nodes):
            continue
        for slots in product(range(len(worth) + 1), repeat=1 + len(nodes)):
            if 1 + len(nodes) + sum(slots) + lead * sum(map(bool, slots)) <= rows:
                best = max(best, worth_of(tree, nodes, slots, worth))
    return best


@given(st.integers(0, 5), st.integers(2, 7), st.integers(0, 2**32))
def test_close_to_the_best_of_all_ways(count: int, rows: int, seed: int) -> None:
    """Taking drafts in the order of their chances is not always best, since their slots move; never far from it."""
    rng = np.random.default_rng(seed)
    tree = DraftTree(
        tuple(range(count)),
        tuple(random_parents(rng, count, 3)),
        tuple(rng.uniform(0.05, 0.6, count).tolist()),
    )
    worth = sorted(rng.uniform(0.02, 0.7, 2).tolist(), reverse=True)
    nodes, slots = spend(tree, rows, 2, worth, 0)
    assert nodes == sorted(nodes) and len(slots) == 1 + len(nodes)
    assert 1 + len(nodes) + sum(slots) <= rows
    found = worth_of(tree, tuple(nodes), tuple(slots), worth)
    assert 0.9 * best_worth(tree, rows, worth, 0) - 1e-9 <= found


def test_a_likely_draft_is_worth_more_than_slots_and_an_unlikely_one_less() -> None:
    assert spend(DraftTree((5,), (ROOT,), (0.9,)), 2, 1, [0.5], 0) == ([0], [0, 0])
    assert spend(DraftTree((5,), (ROOT,), (0.1,)), 2, 1, [0.5], 0) == ([], [1])


def test_every_row_is_spent_or_nothing_is_left_to_spend_it_on() -> None:
    tree = DraftTree((5, 6), (ROOT, ROOT), (0.5, 0.3))
    assert spend(tree, 64, 2, [0.5, 0.2], 0) == ([0, 1], [2, 2, 2])
    assert spend(tree, 64, 0, [], 0) == ([0, 1], [0, 0, 0])


def test_the_rows_that_lead_a_group_are_paid_for() -> None:
    nodes, slots = spend(DraftTree(), 3, 2, [0.5, 0.2], 1)
    assert (nodes, slots) == ([], [1])  # 1 + 1 + 1 rows


def test_chances_that_rounding_put_above_one_leave_no_draft_without_its_parent() -> None:
    tree = DraftTree((5, 6, 7), (ROOT, 0, 1), (0.9, 1.0000001, 1.0000002))
    nodes, _ = spend(tree, 3, 0, [], 0)
    assert nodes == [0, 1]


def test_the_same_draft_of_two_drafters_is_one() -> None:
    own = Proposal("slots", DraftTree((5, 6, 7), (ROOT, ROOT, 0), (0.5, 0.3, 0.4)))
    lookup = Proposal.chain("lookup", [5, 9, 2], [0.8, 0.8, 0.8])
    both = merged([own, lookup])
    assert both.tree == DraftTree((5, 6, 7, 9, 2), (ROOT, ROOT, 0, 0, 3), (0.8, 0.3, 0.4, 0.8, 0.8))
    assert both.sources == ("slots", "slots", "slots", "lookup", "lookup")
    assert merged([own]).tree == own.tree


@pytest.mark.parametrize("rows", [2, 8, 16, 24])
def test_a_policy_never_asks_for_more_rows(rows: int) -> None:
    policy = TreePolicy(rows, 4, [0.5, 0.4], places_slots=True, lead=1)
    tree = DraftTree((5, 6, 7), (ROOT, ROOT, 0), (0.5, 0.3, 0.4))
    proposal, layout = policy.choose([Proposal("slots", tree)])
    assert layout.rows + layout.lead_rows(1) <= rows and layout.drafts == len(proposal.tree)
    assert layout.width > 1 and layout.asks_for_drafts == (rows > 2)
    chains = TreePolicy(rows, 4, [0.5], places_slots=False)
    assert chains.choose([Proposal("heads")]) == (
        Proposal("heads"),
        Layout(0, (0,), 4, width=layout.width),
    )


def test_without_drafts_and_drafter_a_step_is_a_plain_one() -> None:
    """So that the loop runs ahead of the host, as in plain decoding."""
    policy = TreePolicy(8, 0, [], places_slots=False)
    assert policy.choose([Proposal("")])[1] == Layout.plain()
    proposal, layout = policy.choose([Proposal(""), Proposal.chain("lookup", [5, 6], [0.9, 0.9])])
    assert layout == Layout(2, (0, 0, 0)) and proposal.drafts == [5, 6]
