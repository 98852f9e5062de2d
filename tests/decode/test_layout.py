"""Layout arithmetic, against the row counts stated in arXiv 2507.11851 and by direct counting."""

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mtp_mlx.decode.layout import Layout


@pytest.mark.parametrize(("k", "rows"), [(2, 9), (4, 25), (8, 81)])
def test_quadratic_steady_state_is_k_plus_one_squared(k: int, rows: int) -> None:
    assert Layout.quadratic(k, k).rows == rows == (k + 1) ** 2


@pytest.mark.parametrize(("k", "rows"), [(2, 5), (4, 9), (8, 17)])
def test_linear_steady_state_is_two_k_plus_one(k: int, rows: int) -> None:
    assert Layout.linear(k, k).rows == rows


def test_plain_is_one_row() -> None:
    layout = Layout.plain()
    assert (layout.rows, layout.real_rows, layout.slot_rows) == (1, 1, 0)


def test_linear_has_slots_behind_the_last_draft_only() -> None:
    assert Layout.linear(3, 2).slots == (0, 0, 0, 2)
    assert Layout.linear(0, 4).slots == (4,)


@given(st.lists(st.integers(0, 9), min_size=1, max_size=9))
def test_rows_are_the_sum_of_their_parts(slots: list[int]) -> None:
    layout = Layout(len(slots) - 1, tuple(slots))
    assert layout.real_rows == len(slots)
    assert layout.slot_rows == sum(slots)
    assert layout.rows == layout.real_rows + layout.slot_rows


@pytest.mark.parametrize(("drafts", "slots"), [(-1, ()), (0, ()), (1, (1,)), (1, (1, 1, 1)), (1, (2, -1))])
def test_bad_counts_are_refused(drafts: int, slots: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"draft|slot"):
        Layout(drafts, slots)


def test_layouts_are_values() -> None:
    assert Layout.quadratic(2, 3) == Layout(2, (3, 3, 3))
    assert len({Layout.plain(), Layout(0, (0,))}) == 1
    with pytest.raises(dataclasses.FrozenInstanceError):
        Layout.plain().drafts = 2  # type: ignore[misc]
