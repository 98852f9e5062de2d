"""The prefix cache finds the longest usable prefix, leaves what must run again, and keeps to its budget."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mlx_lm.models.cache import ArraysCache, CacheList, KVCache, RotatingKVCache

from mtp_mlx.decode.rollback import needs_copies
from mtp_mlx.serve.prefix_cache import PrefixCache

LAYER = 4 * 2 * 4 * 2  # bytes of a token: 2 heads of 4 float32, keys and values


def filled(tokens: list[int]) -> list[Any]:
    """Two layers whose keys say which token stands where."""
    rows = mx.broadcast_to(mx.array(tokens, dtype=mx.float32)[None, None, :, None], (1, 2, len(tokens), 4))
    layers = [KVCache(), KVCache()]
    for layer in layers:
        layer.update_and_fetch(rows, rows)
        layer.keys, layer.values = layer.keys_and_values()  # no room beyond
    return layers


TOKENS = st.lists(st.integers(0, 2), min_size=1, max_size=12)


@settings(max_examples=150, deadline=None)
@given(st.lists(TOKENS, max_size=6), TOKENS, st.integers(1, 3))
def test_the_longest_common_prefix(stored: list[list[int]], prompt: list[int], spare: int) -> None:
    cache = PrefixCache(1 << 20)
    for tokens in stored:
        cache.store(tokens, filled(tokens))
    found, length = cache.fetch(prompt, spare)
    usable = prompt[: max(0, len(prompt) - spare)]
    common = max((_common(tokens, usable) for tokens in stored), default=0)
    assert length == common
    assert (found is None) == (length == 0)
    for layer in found or []:
        assert layer.offset == length
        assert np.array(layer.keys_and_values()[0])[0, 0, :, 0].tolist() == prompt[:length]


def _common(one: list[int], other: list[int]) -> int:
    return next(
        (i for i, pair in enumerate(zip(one, other)) if pair[0] != pair[1]), min(len(one), len(other))
    )


def test_what_is_fetched_is_a_copy() -> None:
    cache = PrefixCache(1 << 20)
    cache.store([1, 2, 3, 4], filled([1, 2, 3, 4]))
    for _ in range(2):
        found, length = cache.fetch([1, 2, 3, 9, 9], 1)
        assert length == 3 and found is not None
        for layer in found:
            layer.update_and_fetch(mx.ones((1, 2, 1, 4)), mx.ones((1, 2, 1, 4)))
    assert (cache.hits, cache.reused_tokens) == (2, 6)


@settings(max_examples=50, deadline=None)
@given(st.lists(TOKENS, max_size=12), st.integers(0, 20))
def test_the_budget_holds(stored: list[list[int]], tokens_of_room: int) -> None:
    budget = tokens_of_room * 2 * LAYER
    cache = PrefixCache(budget)
    for tokens in stored:
        cache.store(tokens, filled(tokens))
        assert cache.nbytes <= budget
        assert cache.nbytes == 0 or len(cache) > 0


def test_one_that_is_too_large_pushes_nothing_out() -> None:
    cache = PrefixCache(6 * 2 * LAYER)
    cache.store([1, 2, 3], filled([1, 2, 3]))
    cache.store([5] * 7, filled([5] * 7))
    assert len(cache) == 1 and cache.fetch([1, 2, 3, 4], 1)[1] == 3


def state_of(tokens: list[int]) -> ArraysCache:
    """A recurrent state that says which tokens it has read."""
    state = ArraysCache(1)
    state.cache = [mx.array([float(token) for token in tokens])[None]]
    return state


Read = st.tuples(TOKENS, st.sets(st.integers(1, 11), max_size=3))


@settings(max_examples=150, deadline=None)
@given(st.lists(Read, max_size=6), TOKENS, st.integers(1, 3), st.integers(200, 3000))
def test_states_are_found_at_ends_alone(
    stored: list[tuple[list[int], set[int]]], prompt: list[int], spare: int, budget: int
) -> None:
    """And whatever is evicted or moves to a longer text, what is found has read exactly this prefix."""
    for room in (1 << 20, budget):
        cache, known = PrefixCache(room), set()
        for tokens, ends in stored:
            layers = [CacheList(state_of(tokens), *filled(tokens))]
            earlier = [(n, [state_of(tokens[:n]), None, None]) for n in ends if n < len(tokens)]
            cache.store(tokens, layers, earlier)
            known |= {tuple(tokens[:n]) for n, _ in earlier} | {tuple(tokens)}
            assert cache.nbytes <= room
        found, length = cache.fetch(prompt, spare)
        usable = prompt[: max(0, len(prompt) - spare)]
        best = max((len(end) for end in known if end == tuple(usable[: len(end)])), default=0)
        assert length == best if room > budget else length in (0, *map(len, known))
        assert (found is None) == (length == 0)
        for layer in found or []:
            assert layer.caches[0][0][0].tolist() == prompt[:length]
            assert [rows.offset for rows in layer.caches[1:]] == [length, length]
            keys = np.array(layer.caches[1].keys_and_values()[0])
            assert keys[0, 0, :, 0].tolist() == prompt[:length]


def test_a_conversation_keeps_its_keys_once() -> None:
    """Turn by turn, the ends of earlier turns move to the longer text, and the shorter one is dropped."""
    cache = PrefixCache(1 << 20)
    tokens: list[int] = []
    for turn in range(5):
        tokens += [turn, 7, 8]
        cache.store(
            tokens, [state_of(tokens), *filled(tokens)], [(len(tokens) - 1, [state_of([0]), None, None])]
        )
    assert len(cache) == 1 and cache.ends == 10
    assert cache.nbytes == len(tokens) * 2 * LAYER + sum(4 * n for n in range(3, 16, 3)) + 5 * 4


@pytest.mark.parametrize(
    ("layers", "wanted"),
    [([KVCache()], False), ([ArraysCache(2)], True), ([RotatingKVCache(4), KVCache()], True)],
)
def test_which_caches_need_ends(layers: list[Any], wanted: bool) -> None:
    assert needs_copies(layers) == wanted and needs_copies([CacheList(*layers)]) == wanted
    assert not PrefixCache(0).wants_ends(layers)
