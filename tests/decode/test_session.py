"""Session: penalty histories, the border where the cache is quantised, settling and rewinding."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.models.cache import ArraysCache, ChunkedKVCache, KVCache, QuantizedKVCache, RotatingKVCache

from mtp_mlx.decode.layout import Layout
from mtp_mlx.decode.loop import speculative_step
from mtp_mlx.decode.pick import Picker, SamplingConfig
from mtp_mlx.decode.session import CacheSettings, Session
from mtp_mlx.errors import MTPError
from mtp_mlx.model.attach import attach
from tests.decode.fakes import KnowingDrafter, attached
from tests.tiny import VOCABULARY, tiny_model

QUANTISABLE = {"hidden_size": 64, "intermediate_size": 96, "head_dim": 32}
PROMPT = [3, 1, 4, 1, 5]


def session(
    prompt: list[int] = PROMPT,
    sampling: SamplingConfig | None = None,
    truth: list[int] | None = None,
    **settings: int,
) -> Session:
    """A prefilled session on a tiny model."""
    model = attached("llama", **(QUANTISABLE if settings else {}))
    picker = Picker(sampling or SamplingConfig())
    drafter = KnowingDrafter(truth or [0], len(prompt), 1.0, 0)
    cache_settings = CacheSettings(kv_group_size=32, **settings)  # type: ignore[arg-type]
    made = Session(model, picker, prompt, model.make_cache(), cache_settings, lambda start: drafter)
    made.prefill()
    return made


def keys(own: Session) -> list[np.ndarray]:
    """Stored keys of every layer."""
    return [np.array(layer.keys[..., : layer.offset, :]) for layer in own.cache]


def test_prefill_leaves_the_last_token_pending() -> None:
    own = session()
    assert own.cached == len(PROMPT) - 1 and own.tokens == PROMPT
    result = speculative_step(own, Layout.plain(), [])
    assert own.cached == len(PROMPT) and own.tokens == PROMPT + result.tokens and result.n_accepted == 0


@pytest.mark.parametrize("size", [1, 3, 5, 8])
def test_histories(size: int) -> None:
    """Row i knows the tokens before the pick that it makes, drafts included, the latest last."""
    own = session(sampling=SamplingConfig(repetition_penalty=1.3, repetition_context_size=size))
    histories = own.histories([7, 8])
    assert histories is not None
    for row, text in enumerate([PROMPT, [*PROMPT, 7], [*PROMPT, 7, 8]]):
        assert histories[row].tolist() == ([-1] * size + text)[-size:]


def test_no_history_without_penalties() -> None:
    assert session().histories([7, 8]) is None


@pytest.mark.parametrize("start", [0, 4, 5, 6, 9, 5000])
def test_a_block_stays_on_one_side_of_the_quantisation_border(start: int) -> None:
    """The last row that plain decoding would run on an unquantised cache stands at position start - 1."""
    own = session(kv_bits=8, quantized_kv_start=start)
    limit = own.draft_limit()
    if own.cached >= start:
        assert limit is None
    else:
        assert limit is not None and own.cached + limit == start - 1


def test_a_cache_is_never_quantised_before_the_first_pass() -> None:
    """As in mlx-lm, where the first pass over a long unquantised cache still sees it unquantised."""
    first = session([1] * 12, kv_bits=8, quantized_kv_start=5000)
    settings = CacheSettings(kv_bits=8, kv_group_size=32, quantized_kv_start=3)
    second = Session(first.attached, first.picker, [5], first.cache, settings)
    second.prefill()
    assert second.draft_limit() == 0
    speculative_step(second, Layout.plain(), [])
    assert isinstance(second.cache[0], KVCache) and second.draft_limit() is None
    speculative_step(second, Layout.plain(), [])
    assert isinstance(second.cache[0], QuantizedKVCache)


@pytest.mark.parametrize("kept", [1, 2, 3, 4])
def test_settle_takes_back_what_the_consumer_did_not_see(kept: int) -> None:
    """Closing inside a block, at its end (one pass more), and with a border of quantisation in between."""
    reference = session()
    truth = [speculative_step(reference, Layout.plain(), []).tokens[0] for _ in range(4)]
    own = session(truth=truth)
    speculative_step(own, Layout.quadratic(0, 3), [])
    result = speculative_step(own, Layout.quadratic(3, 3), truth[1:4])
    assert result.n_accepted == 3 and result.tokens[:3] == truth[1:]
    own.settle(len(PROMPT) + kept)
    expected = session(PROMPT + truth[:kept] + [0])
    assert own.cached == expected.cached == len(PROMPT) + kept
    for mine, theirs in zip(keys(own), keys(expected), strict=True):
        np.testing.assert_allclose(mine, theirs, atol=1e-5)


def test_settle_does_not_quantise_what_is_too_short_again() -> None:
    """A block reached the border, but the consumer stopped before it."""
    reference = session(kv_bits=8, quantized_kv_start=5000)
    truth = [speculative_step(reference, Layout.plain(), []).tokens[0] for _ in range(4)]
    for kept, kind in [(1, KVCache), (3, QuantizedKVCache)]:
        own = session(truth=truth, kv_bits=8, quantized_kv_start=len(PROMPT) + 3)
        speculative_step(own, Layout.quadratic(0, 2), [])
        assert own.draft_limit() == 2
        assert speculative_step(own, Layout.quadratic(2, 2), truth[1:3]).n_accepted == 2
        own.settle(len(PROMPT) + kept)
        assert own.cached == len(PROMPT) + kept and {type(layer) for layer in own.cache} == {kind}


def test_rewind_forgets_the_newest_pass() -> None:
    own = session()
    before = own.cached
    speculative_step(own, Layout.quadratic(0, 3), [])
    own.rewind()
    assert {layer.offset for layer in own.cache} == {before}


@pytest.mark.parametrize(("prompt", "message"), [([], "empty"), ([VOCABULARY], "outside"), ([-1], "outside")])
def test_bad_prompts(prompt: list[int], message: str) -> None:
    with pytest.raises(MTPError, match=message):
        session(prompt)


def test_caches_that_cannot_give_rows_back_are_refused() -> None:
    llama, hybrid = attached("llama"), attach(tiny_model("qwen3_next", seed=3))
    padded = [ArraysCache(2, left_padding=[0]), *hybrid.make_cache()[1:]]
    for model, caches, message in [
        (llama, [ChunkedKVCache(8)] * 2, "layer 0: its ChunkedKVCache cannot be rolled back"),
        (llama, [ArraysCache(2), KVCache()], "layer 0 of `prompt_cache` is of another kind of model"),
        (hybrid, padded, "ArraysCache belongs to a padded batch"),
    ]:
        given = list(caches)
        with pytest.raises(MTPError, match=message):
            Session(model, Picker(), [1], caches, CacheSettings())
        assert caches == given


def test_a_sliding_window_is_not_quantised() -> None:
    caches = [RotatingKVCache(8), RotatingKVCache(8)]
    with pytest.raises(MTPError, match="sliding-window layers, whose cache cannot be quantised"):
        Session(attached("llama"), Picker(), [1], caches, CacheSettings(kv_bits=8))
    assert {type(cache) for cache in caches} == {RotatingKVCache}


def test_confidences_come_with_the_drafts() -> None:
    result = speculative_step(session(), Layout.linear(0, 3), [])
    assert len(result.fresh) == len(result.fresh.chances) == 3
    assert isinstance(result.logits, mx.array) and result.logits.shape == (1, VOCABULARY)
