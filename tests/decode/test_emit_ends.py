"""Unverified emission leaves a cache that goes on with the right text, however it ended: an end token or a stop
string inside a block, max_tokens, Ctrl-C inside a pass, with sliding windows too; and every kind of
adapter is either emitted as it should be or refused in one sentence."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import pytest
from mlx_lm.generate import generate_step
from mlx_lm.models.cache import make_prompt_cache

from mtp_mlx.api import stream_generate
from mtp_mlx.decode.emission import Emission
from mtp_mlx.decode.loop import mtp_generate_step
from mtp_mlx.decode.pick import SamplingConfig
from mtp_mlx.decode.policy import FixedPolicy
from mtp_mlx.decode.stats import DecodeStats
from mtp_mlx.drafters.heads.cascade import MTPHeads
from mtp_mlx.errors import MTPError
from mtp_mlx.model.attach import AttachedModel, attach
from tests.decode.fakes import attached, untouched
from tests.drafters.heads.test_mtp_head import random_heads
from tests.drafters.ptp.ptp_fakes import ptp_attached
from tests.tiny import tiny_model, tiny_tokenizer

PROMPT = [3, 1, 4, 1, 5]
MORE = [7, 8]
SLOTS = 4
STATIC = Emission("static")


def goes_on(cache: list[Any], told: list[int], architecture: str) -> None:
    """Verified decoding from `cache` writes what mlx-lm writes after the prompt, what was told, and more."""
    assert {layer.offset for layer in cache if hasattr(layer, "offset")} == {len(PROMPT) + len(told)}
    text = mx.array([*PROMPT, *told, *MORE])
    expected = [int(t) for t, _ in generate_step(text, untouched(architecture), max_tokens=8)]
    policy = FixedPolicy("quadratic", 2)
    rest = mtp_generate_step(MORE, attached(architecture), max_tokens=8, policy=policy, prompt_cache=cache)
    assert [item.token for item in rest] == expected


def free_text(architecture: str, count: int) -> list[int]:
    """What static emission writes when nothing ends it."""
    steps = mtp_generate_step(
        PROMPT,
        attached(architecture),
        max_tokens=count,
        policy=FixedPolicy("linear", SLOTS),
        emission=STATIC,
    )
    return [item.token for item in steps]


@pytest.mark.parametrize("architecture", ["llama", "gemma3_text", "olmo3"])
@pytest.mark.parametrize("max_tokens", [1, 5, 6, 8, 10])
def test_after_max_tokens(architecture: str, max_tokens: int) -> None:
    cache = make_prompt_cache(untouched(architecture))
    found = list(
        stream_generate(
            attached(architecture),
            tiny_tokenizer(),
            PROMPT,
            max_tokens,
            emission=STATIC,
            slots=SLOTS,
            prompt_cache=cache,
        )
    )
    assert [r.token for r in found] == free_text(architecture, 10)[:max_tokens]
    goes_on(cache, [r.token for r in found], architecture)


@pytest.mark.parametrize("architecture", ["llama", "gemma3_text", "olmo3"])
def test_after_an_end_token_inside_a_block(architecture: str) -> None:
    free, tokenizer = free_text(architecture, 30), tiny_tokenizer()
    inside = [i for i in range(1, 30) if i % (SLOTS + 1) in (1, 2, 3) and free[i] not in free[:i]]
    assert inside, "no token inside a block is new there"
    tokenizer.eos_token_ids = {free[inside[-1]]}
    cache = make_prompt_cache(untouched(architecture))
    steps = stream_generate(
        attached(architecture), tokenizer, PROMPT, 30, emission=STATIC, slots=SLOTS, prompt_cache=cache
    )
    found = list(steps)
    assert [r.token for r in found] == free[: inside[-1] + 1] and found[-1].finish_reason == "stop"
    goes_on(cache, [r.token for r in found], architecture)


def test_after_a_stop_string_inside_a_block() -> None:
    model, tokenizer = attached("llama"), tiny_tokenizer()
    whole = "".join(
        r.text for r in stream_generate(model, tokenizer, PROMPT, 30, emission=STATIC, slots=SLOTS)
    )
    ends = set()
    for start in range(2, 12):
        stop, cache = whole[start : start + 3], make_prompt_cache(untouched("llama"))
        found = list(
            stream_generate(
                model,
                tokenizer,
                PROMPT,
                30,
                emission=STATIC,
                slots=SLOTS,
                stop=[stop],
                prompt_cache=cache,
            )
        )
        assert "".join(r.text for r in found) == whole[: whole.index(stop)]
        assert found[-1].finish_reason == "stop" and {r.lossless for r in found} == {False}
        goes_on(cache, [r.token for r in found], "llama")
        ends.add(len(found) % (SLOTS + 1))
    assert len(ends) > 2, "stops must fall on several places of a block, or nothing is tested"


@pytest.mark.parametrize("architecture", ["llama", "gemma3_text", "olmo3"])
@pytest.mark.parametrize("broken_pass", [0, 1, 2, 4])
@pytest.mark.parametrize("layer", [0, 1])
def test_ctrl_c_inside_a_pass(architecture: str, broken_pass: int, layer: int) -> None:
    """Every layer of the cache keeps the same beginning of what was told, and mlx-lm goes on from it."""
    model, plain, passes = attached(architecture), untouched(architecture), 0
    inner = model.model.model.layers[layer]
    original = type(inner).__call__
    cache, told = make_prompt_cache(plain), []

    def cut_short(self: Any, *args: Any, **kwargs: Any) -> Any:
        nonlocal passes
        result = original(self, *args, **kwargs)
        passes += self is inner
        if self is inner and passes == broken_pass + 1:
            raise KeyboardInterrupt
        return result

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(inner), "__call__", cut_short)
        steps = mtp_generate_step(
            PROMPT,
            model,
            policy=FixedPolicy("linear", SLOTS),
            emission=STATIC,
            prompt_cache=cache,
            prefill_step_size=3,
        )
        with pytest.raises(KeyboardInterrupt):
            for item in steps:
                told.append(item.token)
    offsets = {leaf.offset for leaf in cache if hasattr(leaf, "offset")}
    assert len(offsets) == 1 and 0 <= (kept := offsets.pop()) <= len(PROMPT) + len(told)
    text = [*PROMPT, *told, *MORE]
    rest = generate_step(mx.array(text[kept:]), plain, prompt_cache=cache, max_tokens=6)
    expected = generate_step(mx.array(text), plain, max_tokens=6)
    assert [int(token) for token, _ in rest] == [int(token) for token, _ in expected]


@pytest.mark.parametrize("moment", ["before the trim", "after the host read"])
def test_ctrl_c_between_a_pass_and_its_commit(moment: str) -> None:
    """The slots' rows never stay in the cache."""
    from mtp_mlx.decode.session import Session

    model, cache, calls, told = attached("llama"), make_prompt_cache(untouched("llama")), 0, []
    where, name = (Session, "trim") if moment == "before the trim" else (DecodeStats, "record_emitted")
    original = getattr(where, name)

    def cut_short(*args: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise KeyboardInterrupt
        return original(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(where, name, cut_short)
        policy = FixedPolicy("linear", SLOTS)
        steps = mtp_generate_step(PROMPT, model, policy=policy, emission=STATIC, prompt_cache=cache)
        with pytest.raises(KeyboardInterrupt):
            for item in steps:
                told.append(item.token)
    (kept,) = {layer.offset for layer in cache}
    assert kept <= len(PROMPT) + len(told) == len(PROMPT) + 2 * (SLOTS + 1)
    text = [*PROMPT, *told, *MORE]
    rest = generate_step(mx.array(text[kept:]), untouched("llama"), prompt_cache=cache, max_tokens=6)
    expected = generate_step(mx.array(text), untouched("llama"), max_tokens=6)
    assert [int(token) for token, _ in rest] == [int(token) for token, _ in expected]


@pytest.mark.parametrize("architecture", ["gemma3_text", "olmo3"])
def test_tau_one_is_plain_greedy_text_with_windows(architecture: str) -> None:
    expected = [int(t) for t, _ in generate_step(mx.array(PROMPT), untouched(architecture), max_tokens=30)]
    steps = mtp_generate_step(
        PROMPT,
        attached(architecture),
        max_tokens=30,
        policy=FixedPolicy("linear", SLOTS),
        emission=Emission("conf-adapt", 1.0),
    )
    assert [item.token for item in steps] == expected


# --- kinds of adapters ------------------------------------------------------------------------------------------


def with_heads() -> AttachedModel:
    model = tiny_model("qwen3", seed=3)
    heads = random_heads(model, 3)
    return attach(model, MTPHeads(heads.heads, heads.convention))


@pytest.mark.parametrize("emit", [STATIC, Emission("conf-adapt"), Emission("verified", 0.5)])
def test_mtp_heads_are_refused(emit: Emission) -> None:
    with pytest.raises(MTPError, match="needs an adapter with mask tokens"):
        list(stream_generate(with_heads(), tiny_tokenizer(), PROMPT, 8, emission=emit))


@pytest.mark.parametrize("variant", ["o", "c"])
def test_ptp_is_verified_only(variant: str) -> None:
    """Unverified emission of its slots is refused, by the loop itself too; a tau for submitting drafts is not."""
    model = ptp_attached("llama", variant, "bits")
    for emit in (STATIC, Emission("conf-adapt", 0.5)):
        with pytest.raises(MTPError, match="Parallel Token Prediction: use `emission` verified"):
            list(stream_generate(model, tiny_tokenizer(), PROMPT, 8, emission=emit))
        with pytest.raises(MTPError, match="Parallel Token Prediction: use `emission` verified"):
            next(mtp_generate_step(PROMPT, model, policy=FixedPolicy("linear", 2), emission=emit))
    hot = SamplingConfig(temperature=0.9, seed=3)
    plain = [r.token for r in mtp_generate_step(PROMPT, model, max_tokens=16, sampling=hot)]
    for tau in (0.02, 0.2, 1.0):
        steps = stream_generate(
            model, tiny_tokenizer(), PROMPT, 16, sampling=hot, emission=Emission("verified", tau)
        )
        found = list(steps)
        assert [r.token for r in found] == plain and {r.lossless for r in found} == {True}


class Watching(FixedPolicy):
    """Remembers the adapter's drafts before every step."""

    def __init__(self) -> None:
        super().__init__("quadratic", SLOTS)
        self.seen: list[list[int]] = []

    def choose(self, proposals: Any) -> Any:
        self.seen.append(proposals[0].drafts)
        return super().choose(proposals)


def test_an_adapter_with_a_sampler_head_is_emitted_and_labelled() -> None:
    """Any mask tokens can be emitted: drafts are those that verified decoding of the same text would submit."""
    model, stats, tokenizer = attached("llama"), DecodeStats(), tiny_tokenizer()
    tokenizer.eos_token_ids = set()
    steps = stream_generate(model, tokenizer, PROMPT, 15, emission=STATIC, slots=SLOTS, stats=stats)
    found = list(steps)
    assert {r.lossless for r in found} == {False} and not stats.lossless
    assert [r.depth for r in found] == [0, 1, 2, 3, 4] * 3
    text = PROMPT + [r.token for r in found]
    for block in range(3):
        start = len(PROMPT) + block * (SLOTS + 1)
        watching = Watching()
        list(mtp_generate_step(text[:start], model, max_tokens=4, policy=watching))
        drafts = watching.seen[1]
        assert len(drafts) >= 2 and drafts == text[start + 1 : start + 1 + len(drafts)]


def test_a_policy_that_asks_for_no_drafts_is_refused() -> None:
    """The default policy is plain decoding, which leaves unverified emission nothing to emit."""
    with pytest.raises(MTPError, match="this policy asks for none"):
        list(mtp_generate_step([1, 2, 3], attached("llama"), emission=Emission("static")))
