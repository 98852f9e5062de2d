"""LookupDrafter against a search that reads the whole text."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mtp_mlx.decode.lookup import LookupDrafter

TEXTS = st.lists(st.integers(0, 3), max_size=40)


def naive(text: list[int], most: int, longest: int, shortest: int) -> tuple[list[int], int]:
    """What follows the last earlier occurrence of the longest suffix that has one."""
    for size in range(longest, shortest - 1, -1):
        for end in range(len(text) - 1, size - 1, -1):
            if text[end - size : end] == text[-size:]:
                drafted = list(text)
                for offset in range(most):
                    drafted.append(drafted[end + offset])
                return drafted[len(text) :], size
    return [], 0


@given(TEXTS, st.integers(0, 8), st.integers(1, 3), st.integers(0, 4), st.data())
def test_equals_a_search_of_the_text(
    text: list[int], most: int, shortest: int, more: int, data: st.DataObject
) -> None:
    drafter = LookupDrafter(shortest + more, shortest)
    cut = data.draw(st.integers(0, len(text)))
    drafter.extend(text[:cut])
    drafter.propose(most)  # asking changes nothing
    drafter.extend(text[cut:])
    assert drafter.propose(most) == naive(text, most, shortest + more, shortest)


def test_a_loop_is_drafted_whole() -> None:
    drafter = LookupDrafter(longest=4, shortest=2)
    drafter.extend([1, 2, 3, 1, 2, 3, 1])
    assert drafter.propose(7) == ([2, 3, 1, 2, 3, 1, 2], 4)


def test_bad_sizes() -> None:
    for longest, shortest in [(2, 3), (2, 0)]:
        with pytest.raises(ValueError, match="n-gram sizes"):
            LookupDrafter(longest, shortest)
