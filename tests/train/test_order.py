"""Proves that the order of examples depends on (number of examples, seed, step) only, and covers every epoch."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mtp_mlx.errors import MTPError
from mtp_mlx.train.order import EpochOrder


@given(
    n=st.integers(1, 90),
    seed=st.integers(0, 2**64),
    batch_size=st.integers(1, 9),
    pool_batches=st.integers(1, 4),
    bucketed=st.booleans(),
    data=st.data(),
)
def test_order_is_a_function_of_the_step_and_covers_every_epoch(
    n, seed, batch_size, pool_batches, bucketed, data
):
    lengths = data.draw(st.lists(st.integers(1, 99), min_size=n, max_size=n)) if bucketed else None

    def fresh():
        return EpochOrder(n, seed, batch_size=batch_size, lengths=lengths, pool_batches=pool_batches)

    order = fresh()
    for epoch in range(3):
        steps = range(epoch * order.steps_per_epoch, (epoch + 1) * order.steps_per_epoch)
        batches = [order.batch(step) for step in steps]
        assert sorted(index for batch in batches for index in batch) == list(range(n))
        assert all(1 <= len(batch) <= batch_size for batch in batches)
    step = data.draw(st.integers(0, 3 * order.steps_per_epoch - 1))
    assert fresh().batch(step) == order.batch(step)


def test_epochs_and_seeds_differ_and_the_order_never_changes_with_versions():
    order = EpochOrder(50, 1, batch_size=50)
    assert len({tuple(order.batch(epoch)) for epoch in range(5)}) == 5
    assert order.batch(0) != EpochOrder(50, 2, batch_size=50).batch(0)
    assert EpochOrder(10, 7, batch_size=10).batch(0) == FROZEN


FROZEN = [8, 1, 3, 2, 4, 7, 0, 6, 9, 5]  # a run of an older version resumes only if this stays


def test_buckets_hold_similar_lengths_in_shuffled_order():
    lengths = [(index * 37) % 101 for index in range(101)]
    order = EpochOrder(101, 3, batch_size=4, lengths=lengths, pool_batches=26)
    spans = [[lengths[index] for index in order.batch(step)] for step in range(order.steps_per_epoch)]
    assert all(max(span) - min(span) <= 3 for span in spans)
    first = [span[0] for span in spans]
    assert first != sorted(first)


@given(
    weights=st.lists(st.floats(0.1, 9), min_size=1, max_size=30),
    seed=st.integers(0, 2**64),
    epochs=st.integers(1, 4),
)
def test_weights_are_how_often_an_example_is_seen(weights, seed, epochs):
    """In every epoch each example gets its share of the places, rounded up or down; no state besides the step."""
    order = EpochOrder(len(weights), seed, batch_size=4, weights=weights)
    for epoch in range(epochs):
        steps = range(epoch * order.steps_per_epoch, (epoch + 1) * order.steps_per_epoch)
        seen = [index for step in steps for index in order.batch(step)]
        assert len(seen) == len(weights)
        for index, weight in enumerate(weights):
            share = weight / sum(weights) * len(weights)
            assert share - 1.001 < seen.count(index) < share + 1.001
    again = EpochOrder(len(weights), seed, batch_size=4, weights=weights)
    assert again.batch(0) == order.batch(0)


def test_shares_even_out_over_epochs_and_equal_weights_change_nothing():
    order = EpochOrder(3, 5, batch_size=3, weights=[1.0, 1.5, 0.5])
    seen = [index for step in range(400) for index in order.batch(step)]
    assert [round(seen.count(index) / 400, 1) for index in range(3)] == [1.0, 1.5, 0.5]
    equal = EpochOrder(10, 7, batch_size=10, weights=[2.0] * 10)
    assert sorted(equal.batch(0)) == list(range(10))


def test_an_order_over_nothing_is_refused():
    with pytest.raises(MTPError, match="no training examples"):
        EpochOrder(0, 1)
    with pytest.raises(ValueError, match="lengths"):
        EpochOrder(3, 1, lengths=[1])
    with pytest.raises(ValueError, match="weights"):
        EpochOrder(2, 1, weights=[1.0, 0.0])
