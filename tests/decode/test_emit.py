"""Unverified emission is the published decoding, ends exactly where it should, and never passes for lossless."""

from __future__ import annotations

from functools import lru_cache
from itertools import pairwise
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mlx_lm.generate import generate_step

from mtp_mlx.api import GenerationResponse, stream_generate
from mtp_mlx.decode.drafter import LazyDrafts, Verified
from mtp_mlx.decode.emission import Emission
from mtp_mlx.decode.loop import mtp_generate_step
from mtp_mlx.decode.pick import Picker, SamplingConfig
from mtp_mlx.decode.policy import ConfidencePolicy, FixedPolicy
from mtp_mlx.decode.stats import DecodeStats
from mtp_mlx.drafters.masks.draft import MaskSlotDrafter
from mtp_mlx.drafters.masks.weights import MaskAdapterConfig, new_adapter
from mtp_mlx.errors import MTPError
from mtp_mlx.model.attach import AttachedModel, attach
from mtp_mlx.planning.choose import build_policy
from tests.decode import naive_emit
from tests.decode.fakes import KnowingDrafter, attached, drafting
from tests.model.naive import NaiveModel, random_adapter
from tests.tiny import ARCHITECTURES, VOCABULARY, tiny_model, tiny_tokenizer

MASK = VOCABULARY - 1
SLOTS = 4
NEAR = 1e-3
PROMPT = [3, 1, 4]
TOKENS = st.integers(0, VOCABULARY - 2)
TAUS = st.sampled_from([None, 0.02, 0.05, 0.1, 0.3, 0.6, 0.9, 1.0])


@lru_cache
def single_mask(architecture: str) -> AttachedModel:
    """A model whose own last token is the mask: the released form. No weight is added."""
    model = tiny_model(architecture, seed=3)
    adapter = new_adapter(model, MaskAdapterConfig(SLOTS, rank=0, sampler_width=0, shared_mask=True))
    embedding = model.model.embed_tokens(mx.array([MASK]))
    adapter.load_tensors({"slot_embeddings.weight": embedding})
    return attach(model, adapter)


@lru_cache
def gated_single_mask() -> tuple[AttachedModel, NaiveModel]:
    """A mask token with a gated LoRA, and the same weights in the slow form."""
    adapter = random_adapter(tiny_model("qwen3", seed=3), sampler_width=0, shared_mask=True)
    return attach(tiny_model("qwen3", seed=3), adapter), NaiveModel(tiny_model("qwen3", seed=3), adapter)


@lru_cache
def untouched(architecture: str) -> Any:
    return tiny_model(architecture, seed=3)


def by_mlx_lm(architecture: str) -> naive_emit.Logits:
    """Logits of mlx-lm's own model on one sequence with mask ids at its end."""
    model = untouched(architecture)
    return lambda text, masks: np.array(model(mx.array([text + [MASK] * masks]))[0, len(text) - 1 :])


def emission(tau: float | None) -> Emission:
    return Emission("static") if tau is None else Emission("conf-adapt", tau)


def run(
    model: AttachedModel, prompt: list[int], max_tokens: int, emit: Emission, slots: int = SLOTS, **more: Any
) -> list[int]:
    policy = build_policy(model, "auto", slots, DecodeStats(), emit)
    items = mtp_generate_step(prompt, model, max_tokens=max_tokens, policy=policy, emission=emit, **more)
    return [item.token for item in items]


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(
    st.sampled_from([name for name in ARCHITECTURES if name != "gemma2"]),
    st.lists(TOKENS, min_size=1, max_size=12),
    st.sampled_from([1, 2, 5, 14]),
    TAUS,
    st.integers(1, SLOTS),
    st.sampled_from([2, 2048]),
)
def test_as_the_reference_emits(
    architecture: str, prompt: list[int], max_tokens: int, tau: float | None, slots: int, prefill: int
) -> None:
    """Blocks and tokens are those of passes without a cache through mlx-lm's own forward."""
    expected = naive_emit.emit(by_mlx_lm(architecture), prompt, max_tokens, slots + 1, tau)
    stats = DecodeStats()
    found = run(
        single_mask(architecture),
        prompt,
        max_tokens,
        emission(tau),
        slots,
        stats=stats,
        prefill_step_size=prefill,
    )
    assert len(found) == max_tokens == stats.tokens
    if expected.margin > NEAR:
        assert found == expected.tokens
        assert stats.steps == len(expected.blocks)
        sizes = [len(block) for block in expected.blocks]
        assert dict(stats.histogram) == {size: sizes.count(size) for size in set(sizes)}
    assert not stats.lossless and not stats.submitted


@pytest.mark.parametrize("tau", [None, 0.02, 0.05, 0.2, 1.0])
def test_gated_lora_acts_on_masks_only(tau: float | None) -> None:
    model, naive = gated_single_mask()

    def logits(text: list[int], masks: int) -> np.ndarray:
        return np.array(model.head(mx.array(naive.hidden(text, masks)[len(text) - 1 :])[None])[0])

    expected = naive_emit.emit(logits, PROMPT, 20, SLOTS + 1, tau, own_pick=True)
    assert expected.margin > 1e-4
    assert run(model, PROMPT, 20, emission(tau)) == expected.tokens


def test_behind_gated_slots_the_first_token_need_not_reach_tau() -> None:
    """Tau between the probabilities of the first token and of a surer draft: the paper would emit one."""
    model, naive = gated_single_mask()

    def logits(text: list[int], masks: int) -> np.ndarray:
        return np.array(model.head(mx.array(naive.hidden(text, masks)[len(text) - 1 :])[None])[0])

    checked = 0
    for first in range(3, 150, 3):
        prompt = [first, (first * 7) % 150]
        rows = logits(prompt, 1).astype(np.float64)
        own, draft = (np.exp(rows - rows.max(axis=1, keepdims=True)).sum(axis=1) ** -1).tolist()
        tau = (own + draft) / 2
        if draft < own * 1.01:
            continue
        expected = naive_emit.emit(logits, prompt, 2, SLOTS + 1, tau, own_pick=True)
        assert (
            len(expected.blocks) == 1 and len(naive_emit.emit(logits, prompt, 2, SLOTS + 1, tau).blocks) == 2
        )
        stats = DecodeStats()
        assert run(model, prompt, 2, emission(tau), stats=stats) == expected.tokens
        assert stats.steps == 1
        checked += 1
    assert checked > 2


@pytest.mark.parametrize("tau", [None, 0.02, 0.05, 0.1])
def test_a_draft_vocabulary_is_for_verified_drafts(tau: float | None) -> None:
    """What nobody checks competes with all tokens, in the pick and in the probability that tau is compared with."""
    model = tiny_model("llama", seed=3)
    shape = MaskAdapterConfig(SLOTS, rank=0, sampler_width=0, shared_mask=True, draft_vocab_size=20)
    adapter = new_adapter(model, shape, mx.arange(20))
    adapter.load_tensors(
        {"slot_embeddings.weight": model.model.embed_tokens(mx.array([MASK])), "draft_ids": mx.arange(20)}
    )
    attached = attach(model, adapter)
    blocks = 0
    for first in range(0, 60, 7):
        prompt = [first, first + 1]
        expected = naive_emit.emit(by_mlx_lm("llama"), prompt, 14, SLOTS + 1, tau)
        if expected.margin > NEAR:
            assert run(attached, prompt, 14, emission(tau)) == expected.tokens
            blocks += len(expected.blocks)
    assert blocks > 10


def test_the_cases_above_emit_runs_of_every_length() -> None:
    """Guards the property test against never leaving runs of one."""
    lengths = {
        len(block)
        for tau in (0.02, 0.05, 0.1, 0.3)
        for block in naive_emit.emit(by_mlx_lm("llama"), PROMPT, 30, SLOTS + 1, tau).blocks
    }
    assert lengths >= {1, 2, 3}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_tau_one_is_plain_greedy_text(architecture: str) -> None:
    expected = [t for t, _ in generate_step(mx.array(PROMPT), untouched(architecture), max_tokens=24)]
    for model in (single_mask(architecture), attached(architecture)):
        assert run(model, PROMPT, 24, Emission("conf-adapt", 1.0)) == expected


def test_tau_one_with_first_token_sampling_is_plain_sampled_text() -> None:
    sampling = SamplingConfig(temperature=0.9, top_k=20, repetition_penalty=1.2, seed=5)
    model = single_mask("llama")
    plain = [item.token for item in mtp_generate_step(PROMPT, model, max_tokens=24, sampling=sampling)]
    greedy = run(model, PROMPT, 24, Emission("conf-adapt", 1.0))
    found = run(model, PROMPT, 24, Emission("conf-adapt", 1.0, True), sampling=sampling)
    assert found == plain != greedy


def test_runs_are_greedy_where_first_tokens_are_sampled() -> None:
    """A pass that emits one token samples it; one that emits more takes the likeliest."""
    sampling, model, stats = SamplingConfig(temperature=1.2, seed=1), single_mask("llama"), DecodeStats()
    policy = FixedPolicy("linear", SLOTS)
    emit = Emission("conf-adapt", 0.3, True)
    items = list(
        mtp_generate_step(
            PROMPT, model, max_tokens=40, sampling=sampling, policy=policy, emission=emit, stats=stats
        )
    )
    assert 1 in stats.histogram and max(stats.histogram) > 2
    picker, likeliest = Picker(sampling), 0
    for index, (item, following) in enumerate(pairwise([*items, None])):
        alone = not item.from_draft and not (following is not None and following.from_draft)
        position = mx.array([len(PROMPT) + index])
        sampled, best = (
            int(picker.pick(item.logits[None], position).item()),
            int(mx.argmax(item.logits).item()),
        )
        assert item.token == (sampled if alone else best)
        likeliest += alone and sampled != best
    assert likeliest > 3, "sampling must differ from the likeliest token, or nothing is tested"


# --- where it ends --------------------------------------------------------------------------------------------


def responses(model: AttachedModel, max_tokens: int = 40, **options: Any) -> list[GenerationResponse]:
    options = {"emission": Emission("static"), "slots": SLOTS, **options}
    return list(stream_generate(model, tiny_tokenizer(), PROMPT, max_tokens, **options))


@pytest.mark.parametrize("max_tokens", range(1, 12))
@pytest.mark.parametrize("tau", [None, 0.1])
def test_max_tokens_is_exact(max_tokens: int, tau: float | None) -> None:
    """A shorter limit gives a beginning of the longer text."""
    model = single_mask("llama")
    found = responses(model, max_tokens, emission=emission(tau))
    assert len(found) == max_tokens and found[-1].finish_reason == "length"
    assert len(run(model, PROMPT, max_tokens, emission(tau))) == max_tokens, "the loop itself, unhelped"
    longer = [r.token for r in responses(model, 24, emission=emission(tau))]
    assert [r.token for r in found] == longer[:max_tokens]


def test_an_end_token_inside_a_block_ends_the_text() -> None:
    tokenizer, model = tiny_tokenizer(), single_mask("llama")
    free = run(model, PROMPT, 30, Emission("static"))
    inside = [i for i in range(1, 30) if i % (SLOTS + 1) in (1, 2) and free[i] not in free[:i]]
    assert inside, "no token inside a block is new there"
    for index in inside[:3]:
        tokenizer.eos_token_ids = {free[index]}
        found = list(stream_generate(model, tokenizer, PROMPT, 30, emission=Emission("static"), slots=SLOTS))
        assert [r.token for r in found] == free[: index + 1]
        assert found[-1].finish_reason == "stop"


def test_a_stop_string_inside_a_block_cuts_the_text() -> None:
    model = single_mask("llama")
    whole = "".join(r.text for r in responses(model, 30))
    assert len(whole) > 12
    for start in (3, 6, 9):
        stop = whole[start : start + 3]
        found = responses(model, 30, stop=[stop])
        assert "".join(r.text for r in found) == whole[: whole.index(stop)]
        assert found[-1].finish_reason == "stop"


@pytest.mark.parametrize("stop_after", range(1, 8))
@pytest.mark.parametrize("kv_bits", [None, 8])
def test_closing_inside_a_block_leaves_the_text_so_far_in_the_cache(
    stop_after: int, kv_bits: int | None
) -> None:
    quantisable = {"hidden_size": 64, "intermediate_size": 96, "head_dim": 32}
    model = attached("llama", **(quantisable if kv_bits else {}))
    cache = model.make_cache()
    options: dict[str, Any] = {"kv_bits": kv_bits, "kv_group_size": 32, "quantized_kv_start": 0}
    steps = mtp_generate_step(
        PROMPT,
        model,
        policy=FixedPolicy("linear", SLOTS),
        emission=Emission("static"),
        prompt_cache=cache,
        **options,
    )
    told = [next(steps).token for _ in range(stop_after)]
    steps.close()
    assert {layer.offset for layer in cache} == {len(PROMPT) + stop_after}
    rest = [t.token for t in mtp_generate_step([7, 8], model, prompt_cache=cache, max_tokens=6, **options)]
    whole = [*PROMPT, *told, 7, 8]
    if kv_bits is None:
        assert rest == [t for t, _ in generate_step(mx.array(whole), untouched("llama"), max_tokens=6)]


# --- labels and refusals ----------------------------------------------------------------------------------------


def test_every_response_says_lossless_false() -> None:
    for emit in (Emission("static"), Emission("conf-adapt", 0.1)):
        found = responses(single_mask("llama"), 9, emission=emit)
        assert {r.lossless for r in found} == {False}
        assert found[-1].stats.to_json()["lossless"] is False
    assert {r.lossless for r in responses(single_mask("llama"), 9, emission=Emission())} == {True}


@pytest.mark.parametrize(
    ("emit", "options", "message"),
    [
        (Emission("static"), {"lookup": True}, "must be verified"),
        (Emission("static"), {"layout": "plain"}, "cannot be combined with layout 'plain'"),
        (Emission("conf-adapt"), {"layout": "quadratic"}, "cannot be combined with layout 'quadratic'"),
        (Emission("verified", 0.5), {"layout": "plain"}, "cannot be combined with layout 'plain'"),
        (Emission("conf-adapt"), {"slots": 9}, "drafts per step must be 1 to 4"),
        (Emission("conf-adapt"), {"sampling": SamplingConfig(temperature=0.7)}, "`first_token_sampling`"),
        (Emission("conf-adapt", 0.9, True), {}, "needs a `temperature`"),
    ],
)
def test_what_does_not_go_together_is_refused(emit: Emission, options: dict[str, Any], message: str) -> None:
    with pytest.raises(MTPError, match=message):
        responses(single_mask("llama"), emission=emit, **options)


@pytest.mark.parametrize("emit", [Emission("static"), Emission("conf-adapt"), Emission("verified", 0.5)])
def test_without_mask_tokens_it_is_refused(emit: Emission) -> None:
    with pytest.raises(MTPError, match="needs an adapter with mask tokens"):
        responses(attach(tiny_model("llama")), emission=emit, slots=None)
    if not emit.lossless:
        with pytest.raises(MTPError, match="needs an adapter with mask tokens"):
            next(mtp_generate_step(PROMPT, attach(tiny_model("llama")), emission=emit))


# --- verified, with tau -----------------------------------------------------------------------------------------


class DoubtingDrafter(KnowingDrafter):
    """Knows the text and gives every draft its own confidence."""

    def propose(self, verified: Verified) -> LazyDrafts:
        ids = super().propose(verified).ids
        return LazyDrafts(ids, mx.abs(mx.sin(1.7 * (verified.position + mx.arange(len(ids))))))


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(
    st.sampled_from(ARCHITECTURES),
    st.lists(TOKENS, min_size=1, max_size=12),
    st.sampled_from(["linear", "quadratic", "auto"]),
    st.sampled_from([0.1, 0.4, 0.8, 1.0]),
    st.sampled_from([0.0, 0.9]),
    st.booleans(),
)
def test_verified_with_tau_is_lossless(
    architecture: str, prompt: list[int], layout: Any, tau: float, temperature: float, knowing: bool
) -> None:
    model, sampling = attached(architecture), SamplingConfig(temperature=temperature, seed=7)
    plain = list(mtp_generate_step(prompt, model, max_tokens=16, sampling=sampling))
    expected = [item.token for item in plain]
    drafter = DoubtingDrafter(expected, len(prompt), 0.9, 1) if knowing else None
    with drafting(drafter):
        policy = build_policy(model, layout, 3, DecodeStats(), Emission("verified", tau))
        found = list(mtp_generate_step(prompt, model, max_tokens=16, sampling=sampling, policy=policy))
    tokens = [item.token for item in found]
    if tokens != expected:  # only a near tie may do that
        at = next(i for i, pair in enumerate(zip(tokens, expected, strict=True)) if len(set(pair)) > 1)
        assert np.abs(np.array(found[at].logits - plain[at].logits)).max() < 1e-4


def test_tau_decides_how_many_drafts_are_submitted() -> None:
    model = attached("llama")
    expected = [item.token for item in mtp_generate_step(PROMPT, model, max_tokens=40)]
    submitted, steps = [], []
    for tau in (0.0001, 0.5, 0.9, 1.0):
        stats = DecodeStats()
        with drafting(DoubtingDrafter(expected, 3, 1.0, 0)):
            policy = build_policy(model, "quadratic", 4, stats, Emission("verified", tau))
            assert isinstance(policy, ConfidencePolicy)
            found = mtp_generate_step(PROMPT, model, max_tokens=40, policy=policy, stats=stats)
            assert [item.token for item in found] == expected
        submitted.append(sum(stats.submitted))
        steps.append(stats.steps)
        assert stats.lossless
    assert submitted == sorted(submitted, reverse=True) and submitted[-1] == 0
    assert steps == sorted(steps) and len(set(steps)) > 2


def test_a_drafter_without_sampler_picks_its_slots_together_as_one_by_one() -> None:
    """One call of the head for all slots and one call per slot are the same drafts."""
    model = single_mask("llama")
    policy = FixedPolicy("linear", SLOTS)
    together = [i.token for i in mtp_generate_step(PROMPT, model, policy=policy, emission=Emission("static"))]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MaskSlotDrafter, "_pick_together", None)
        original = MaskSlotDrafter.__init__

        def one_by_one(self: Any, *arguments: Any, **named: Any) -> None:
            original(self, *arguments, **named)
            self._together = False

        patch.setattr(MaskSlotDrafter, "__init__", one_by_one)
        alone = [
            i.token for i in mtp_generate_step(PROMPT, model, policy=policy, emission=Emission("static"))
        ]
    assert together == alone
