"""Counts of n-grams equal a count token by token; what leaves a table that is too large is the rarest."""

from __future__ import annotations

import time
from collections import Counter, defaultdict

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mtp_mlx.drafters.memory.ngrams import (
    HASH_BITS,
    LONGEST,
    MOST_FOLLOWERS,
    OTHERS,
    TOKEN_BITS,
    Table,
    limited,
    merged,
)
from mtp_mlx.drafters.memory.running_text import contexts_of
from tests.drafters.memory.tables import as_counter, counts_of, is_sorted, naive_counts, size_of

TOKENS = st.lists(st.integers(0, 3), max_size=30)
TEXTS = st.lists(TOKENS.flatmap(lambda text: st.tuples(st.just(text), st.integers(0, len(text)))), max_size=5)


@given(TEXTS)
def test_counts(texts: list[tuple[list[int], int]]) -> None:
    """No n-gram crosses from one text to the next, and prompts are context only."""
    table = counts_of(texts)
    assert as_counter(table) == naive_counts(texts) and is_sorted(table)


def test_large_ids_and_all_sizes_of_contexts() -> None:
    tokens = [OTHERS - 1, 0, OTHERS - 1, 7, 8, 9, 10, 11, 12]
    table = counts_of([(tokens, 0)])
    assert as_counter(table) == naive_counts([(tokens, 0)])
    assert {size_of(context) for context, _ in as_counter(table)} == set(range(1, LONGEST + 1))


@given(TEXTS, TEXTS)
def test_two_tables_together(first: list[tuple[list[int], int]], second: list[tuple[list[int], int]]) -> None:
    table = merged(counts_of(first), counts_of(second))
    assert as_counter(table) == naive_counts(first) + naive_counts(second) and is_sorted(table)


def test_contexts_differ() -> None:
    """Of a hundred thousand random contexts no two have the same hash; it depends on every token and the order."""
    rng = np.random.default_rng(0)
    texts = {tuple(text) for text in rng.integers(0, 150_000, (100_000, LONGEST)).tolist()}
    assert len({contexts_of(text)[-1] for text in texts}) == len(texts)
    assert len({contexts_of(text)[-1] for text in ([1, 2, 3], [3, 2, 1], [1, 2, 2], [2, 2, 3], [2, 3])}) == 5


def random_table(entries: int, seed: int) -> Table:
    """Contexts with one to thirty followers."""
    rng = np.random.default_rng(seed)
    keys = set()
    while len(keys) < entries:
        context = (int(rng.integers(1, LONGEST + 1)) << HASH_BITS) | int(rng.integers(1 << HASH_BITS))
        many = int(rng.choice([1, 2, 30]))
        keys |= {(context << TOKEN_BITS) | int(token) for token in rng.integers(0, 50_000, many)}
    counts = rng.choice([1, 1, 1, 2, 3, 50], len(keys)).astype(np.uint32)
    return Table(np.array(sorted(keys), np.uint64), counts)


def by_context(table: Table) -> dict[int, dict[int, int]]:
    found: dict[int, dict[int, int]] = defaultdict(dict)
    for (context, token), count in as_counter(table).items():
        found[context][token] = count
    return found


@pytest.mark.parametrize("seed", range(3))
def test_the_most_frequent_followers_stay(seed: int) -> None:
    """The others are still counted, together."""
    table = random_table(3000, seed)
    found = by_context(limited(table, 10**9))
    for context, before in by_context(table).items():
        after, ordered = found[context], sorted(before.values(), reverse=True)
        assert sum(after.values()) == sum(before.values()) and len(after) == min(len(before), MOST_FOLLOWERS)
        named = sorted((count for token, count in after.items() if token != OTHERS), reverse=True)
        assert named == ordered[: len(named)]
    assert any(len(each) > MOST_FOLLOWERS for each in by_context(table).values())
    again = limited(limited(table, 10**9), 10**9)
    assert as_counter(again) == as_counter(limited(table, 10**9))


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("most", [0, 1, 10, 200, 900])
def test_the_rarest_leave(most: int, seed: int) -> None:
    """Whoever leaves was not seen more often than anybody who stays."""
    table = random_table(3000, seed)
    kept = limited(table, most)
    assert len(kept) <= most and is_sorted(kept) and len(kept) >= most // 2
    before, after = as_counter(limited(table, 10**9)), as_counter(kept)
    named = Counter({key: count for key, count in after.items() if key[1] != OTHERS})
    left = [
        (count, -size_of(key[0])) for key, count in before.items() if key not in after and key[1] != OTHERS
    ]
    stayed = [(count, -size_of(context)) for (context, _), count in named.items()]
    assert all(before[key] == count for key, count in named.items())
    assert not stayed or not left or max(left) <= min(stayed)
    contexts = {context for context, _ in named}
    for context, others in ((key[0], count) for key, count in after.items() if key[1] == OTHERS):
        assert context in contexts and others <= sum(c for key, c in before.items() if key[0] == context)


def test_contexts_that_lost_followers_before() -> None:
    """Each has a place for `OTHERS`, so more entries have to leave than are too many."""
    table = random_table(3000, 1)
    once = limited(table, 10**9)
    for most in range(len(once) - 1, len(once) // 2, -37):
        assert len(limited(table, most)) <= most


def test_of_equally_rare_ones_the_older_leave() -> None:
    old = counts_of([([1, 2], 0), ([3, 4], 0), ([5, 6], 0), ([7, 8], 0)])
    new = counts_of([([11, 12], 0), ([13, 14], 0)])
    kept = limited(merged(old, new), 2, new)
    assert as_counter(kept).keys() <= as_counter(new).keys() and len(kept)


def test_a_large_text_is_counted_in_seconds() -> None:
    """The bound is generous, and a loop over tokens would still break it."""
    tokens = np.random.default_rng(0).integers(0, 5000, 200_000).tolist()
    started = time.perf_counter()
    table = limited(counts_of([(tokens, 0)]), 500_000)
    assert time.perf_counter() - started < 10 and len(table) <= 500_000
