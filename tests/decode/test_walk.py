"""Verification of a tree: the accepted path is the one that a walk from the root finds."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from mtp_mlx.decode.pick import leading_run
from mtp_mlx.decode.tree import ROOT, depths_of, walk
from tests.decode.trees import random_parents


def walked(picks: list[int], drafts: list[int], parents: list[int]) -> list[int]:
    """Real rows of the accepted path, one after another."""
    rows, last = [0], ROOT
    while True:
        right = [n for n, p in enumerate(parents) if p == last and drafts[n] == picks[last + 1]]
        if not right:
            return rows
        (last,) = right
        rows.append(last + 1)


@given(st.integers(1, 12), st.integers(0, 2**32), st.integers(1, 5))
def test_equals_a_walk(count: int, seed: int, deepest: int) -> None:
    rng = np.random.default_rng(seed)
    parents = random_parents(rng, count, deepest)
    drafts: list[int] = []
    for node, parent in enumerate(parents):  # siblings differ
        taken = {drafts[n] for n in range(node) if parents[n] == parent}
        drafts.append(min({0, 1, 2, *range(3, 15)} - taken) if rng.random() < 0.7 else 20 + node)
    picks = rng.integers(0, 3, count + 1).tolist()
    expected = walked(picks, drafts, parents)
    found = walk(mx.array(picks), mx.array(drafts), tuple(parents))
    longest = max(depths_of(parents))
    assert found.accepted.item() == len(expected) - 1
    assert found.last.item() == expected[-1]
    assert found.path.tolist() == expected + expected[-1:] * (1 + longest - len(expected))
    assert found.path.dtype == found.last.dtype == found.accepted.dtype == mx.int32


@given(st.lists(st.integers(0, 1), min_size=1, max_size=8), st.data())
def test_of_a_chain_it_is_the_leading_run(drafts: list[int], data: st.DataObject) -> None:
    size = len(drafts) + 1
    picks = mx.array(data.draw(st.lists(st.integers(0, 1), min_size=size, max_size=size)), dtype=mx.int32)
    chain = mx.array(drafts, dtype=mx.int32)
    found = walk(picks, chain, tuple(range(-1, len(drafts) - 1)))
    assert found.accepted.item() == found.last.item() == leading_run(picks, chain).item()
