"""A prompt cache is mlx-lm's own again, and holds a beginning of the text, however a generation ends.

Ctrl-C is raised where Python itself would raise it: on entry of a function, or behind a call into C.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.generate import generate_step
from mlx_lm.models.cache import (
    ArraysCache,
    CacheList,
    KVCache,
    QuantizedKVCache,
    RotatingKVCache,
    make_prompt_cache,
)

from mtp_mlx.decode.cache_check import check_quantisation
from mtp_mlx.decode.emission import Emission
from mtp_mlx.decode.loop import mtp_generate_step
from mtp_mlx.decode.policy import ChainPolicy, FixedPolicy
from mtp_mlx.decode.rollback import LayerCaches, take_back
from mtp_mlx.decode.session import Session
from mtp_mlx.errors import MTPError
from mtp_mlx.model.attach import attach
from tests.decode.fakes import untouched
from tests.decode.test_hybrid_loop import KnowingLookup, Uneven, bare, with_heads
from tests.drafters.heads.test_independent import model_with
from tests.drafters.heads.test_loop import SometimesChain
from tests.tiny import tiny_model

PROMPT, LENGTH = [3, 5, 7, 11, 90, 2, 4], 14
KV: dict[str, Any] = {"kv_bits": 8, "kv_group_size": 32, "quantized_kv_start": 12}
TRIES = 14


def leaves(cache: list[Any]) -> list[Any]:
    """Every cache of a prompt cache."""
    return [leaf for layer in cache for leaf in (layer.caches if isinstance(layer, CacheList) else [layer])]


def is_mlx_lms(cache: list[Any]) -> bool:
    """Nothing of ours is left in it."""
    kinds = (KVCache, QuantizedKVCache, RotatingKVCache, ArraysCache)
    return {type(leaf) for leaf in leaves(cache)} <= set(kinds)


@contextmanager
def interrupted(at: int, seen: list[int]) -> Iterator[None]:
    """Ctrl-C at the `at`-th of those moments inside mtp_mlx and mlx_lm; `seen` counts them."""

    def profile(frame: FrameType, event: str, _: Any) -> None:
        if event in ("call", "c_return") and "tests" not in frame.f_code.co_filename:
            seen[0] += 1
            if seen[0] == at:
                raise KeyboardInterrupt

    sys.setprofile(profile)
    try:
        yield
    finally:
        sys.setprofile(None)


def text_of(name: str, **options: Any) -> list[int]:
    """What mlx-lm writes."""
    steps = generate_step(mx.array(PROMPT), untouched(name), max_tokens=LENGTH + 10, **options)
    return [int(token) for token, _ in steps]


def check(cache: list[Any], name: str, truth: list[int]) -> None:
    """It holds a beginning of the text, says how long it is, and mlx-lm goes on from there."""
    assert is_mlx_lms(cache)
    offsets = {leaf.offset for leaf in leaves(cache) if hasattr(leaf, "offset")}
    assert len(offsets) == 1
    whole, end = [*PROMPT, *truth], len(PROMPT) + LENGTH + 1
    rest = generate_step(
        mx.array(whole[offsets.pop() : end]), untouched(name), prompt_cache=cache, max_tokens=6
    )
    assert [int(token) for token, _ in rest] == whole[end : end + 6]


def generation(name: str, kind: str, truth: list[int], cache: list[Any]) -> Callable[[], None]:
    """A generation that accepts and rejects drafts, and is closed before its end or not."""
    heads = kind == "heads"
    model = with_heads(name, 2) if heads else bare(name)
    policy: Any = SometimesChain(3) if heads else Uneven(4)
    lookup = KnowingLookup(truth, len(PROMPT), (False, False, True))
    steps = mtp_generate_step(
        PROMPT,
        model,
        policy=policy,
        lookup=lookup,
        prompt_cache=cache,
        max_tokens=LENGTH,
        prefill_step_size=3,
        **(KV if kind == "quantised" else {}),
    )

    def run() -> None:
        for number, _ in enumerate(steps):
            if kind == "closed" and number == 9:
                break
        steps.close()

    return run


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("gemma3_text", "closed"),
        ("gemma3_text", "heads"),
        ("qwen3_next", ""),
        ("qwen3_next", "heads"),
        ("falcon_h1", "closed"),
    ],
)
def test_ctrl_c_at_any_moment(name: str, kind: str) -> None:
    truth, seen = text_of(name), [0]
    for _ in range(2):  # the first run also fills caches of functions
        seen[0] = 0
        cache = make_prompt_cache(untouched(name))
        run = generation(name, kind, truth, cache)
        with interrupted(-1, seen):
            run()
        check(cache, name, truth)
    rng, cut = np.random.default_rng(5), 0
    # The last moments are those of handing the cache back.
    moments = [*rng.integers(1, seen[0] - 60, TRIES), *range(seen[0] - 60, seen[0] - 8, 4)]
    for moment in moments:
        cache = make_prompt_cache(untouched(name))
        run = generation(name, kind, truth, cache)
        try:
            with interrupted(int(moment), [0]):
                run()
        except KeyboardInterrupt:
            cut += 1
        check(cache, name, truth)
    assert cut >= len(moments) - 2


@pytest.mark.parametrize("moment", [1, 2])
def test_ctrl_c_while_the_cache_is_quantised(moment: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows that are quantised are not taken back: mlx-lm would have quantised them at that length, and not before."""
    overrides = {"hidden_size": 64, "head_dim": 32}
    model, plain = attach(tiny_model("llama", seed=3, **overrides)), tiny_model("llama", seed=3, **overrides)
    expected = make_prompt_cache(plain)
    steps = generate_step(mx.array(PROMPT), plain, prompt_cache=expected, max_tokens=5, **KV)
    truth = [int(token) for token, _ in steps]
    quantised, to_quantized = [0], KVCache.to_quantized

    def cut_short(self: KVCache, **options: Any) -> Any:
        quantised[0] += 1
        if quantised[0] == moment:
            raise KeyboardInterrupt
        return to_quantized(self, **options)

    cache = make_prompt_cache(plain)
    check_quantisation(model, cache, KV["kv_bits"], KV["kv_group_size"])  # tried once a model
    monkeypatch.setattr(KVCache, "to_quantized", cut_short)
    lookup = KnowingLookup(truth, len(PROMPT), (False,))
    with pytest.raises(KeyboardInterrupt):
        list(mtp_generate_step(PROMPT, model, policy=Uneven(4), lookup=lookup, prompt_cache=cache, **KV))
    assert {layer.offset for layer in cache} == {KV["quantized_kv_start"]}


def refused(model: Any, cache: list[Any], **options: Any) -> str:
    """The message of a generation that is refused; the list holds the very objects that it held."""
    before = list(cache)
    with pytest.raises(MTPError) as caught:
        list(mtp_generate_step(PROMPT, model, prompt_cache=cache, max_tokens=4, **options))
    assert all(one is other for one, other in zip(cache, before, strict=True))
    return str(caught.value)


def test_a_refusal_leaves_the_cache_alone() -> None:
    """Of recurrent state that does not say where it is, too many drafts, windows that are to be quantised, an
    emission without slots, and state that no recorded module moves."""
    rwkv = make_prompt_cache(untouched("rwkv7"))
    untouched("rwkv7")(mx.array([PROMPT]), cache=rwkv)
    assert "does not say how many tokens" in refused(bare("rwkv7"), rwkv)
    medusa = model_with("medusa")
    assert "drafts per step must be 1 to" in refused(medusa, medusa.make_cache(), policy=ChainPolicy(4))
    windows = bare("gemma3_text")
    assert "leave `kv_bits` out" in refused(windows, windows.make_cache(), kv_bits=8)
    for name in ("gemma3_text", "qwen3_next"):
        emission = Emission("static")
        assert "needs an adapter with mask tokens" in refused(
            bare(name), bare(name).make_cache(), emission=emission, policy=FixedPolicy("linear", 2)
        )
    griffin = attach(tiny_model("recurrent_gemma", seed=3))
    assert "has no seam 'cache'" in refused(griffin, griffin.make_cache())


def test_a_session_that_never_ran_can_be_rewound() -> None:
    """Ctrl-C before the first pass: nothing was exchanged, nothing is taken back."""
    for name in ("gemma3_text", "qwen3_next", "rwkv7"):
        cache = make_prompt_cache(untouched(name))
        caches = LayerCaches(cache, name)
        assert is_mlx_lms(cache) and caches.length == 0
        caches.keep(0)
        caches.hand_back()
        assert is_mlx_lms(cache)


@pytest.mark.parametrize("method", ["rewind", "hand_back"])
def test_a_fault_at_the_end_shows(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The checks above are not empty: without taking back, or without handing back, they fail."""
    owner: Any = Session if method == "rewind" else LayerCaches
    monkeypatch.setattr(owner, method, lambda self: None)
    with pytest.raises(AssertionError):
        test_ctrl_c_at_any_moment("gemma3_text", "closed")


def test_copied_states_can_be_used_again() -> None:
    """What runs on a prompt cache after it was taken back does not change the copies."""
    keys, recurrent, copied = KVCache(), ArraysCache(1), ArraysCache(1)
    keys.update_and_fetch(mx.zeros((1, 1, 4, 2)), mx.zeros((1, 1, 4, 2)))
    recurrent[0], copied[0] = mx.full((1, 3), 4.0), mx.full((1, 3), 4.0)
    layers = [CacheList(keys, recurrent)]
    for _ in range(2):
        rows, state = layers[0].caches
        rows.update_and_fetch(mx.ones((1, 1, 3, 2)), mx.ones((1, 1, 3, 2)))
        state[0] = mx.full((1, 3), 7.0)
        take_back(layers, 3, [None, copied])
        rows, state = layers[0].caches
        assert rows.offset == 4 and state[0].tolist() == [[4.0] * 3]
