"""The acceptance rule: the leading run of equal tokens, never a count of matches."""

from __future__ import annotations

from itertools import takewhile

import mlx.core as mx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mtp_mlx.decode.pick import leading_run


@given(st.data(), st.integers(0, 12))
def test_equals_a_loop(data: st.DataObject, n_drafts: int) -> None:
    tokens = st.integers(0, 1)
    picks = data.draw(st.lists(tokens, min_size=n_drafts + 1, max_size=n_drafts + 1))
    drafts = data.draw(st.lists(tokens, min_size=n_drafts, max_size=n_drafts))
    expected = len(list(takewhile(lambda pair: pair[0] == pair[1], zip(picks, drafts, strict=False))))
    run = leading_run(mx.array(picks, dtype=mx.int32), mx.array(drafts, dtype=mx.int32))
    assert run.item() == expected and run.dtype == mx.int32 and run.shape == ()


@pytest.mark.parametrize(
    ("drafts", "expected"), [([5, 9, 7], 1), ([9, 6, 7], 0), ([5, 6, 7], 3), ([5, 6, 9], 2), ([], 0)]
)
def test_matches_behind_a_rejection_count_nothing(drafts: list[int], expected: int) -> None:
    picks = mx.array([5, 6, 7, 8][: len(drafts) + 1], dtype=mx.int32)
    assert leading_run(picks, mx.array(drafts, dtype=mx.int32)).item() == expected
