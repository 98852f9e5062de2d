"""Sequences that share passes write what each writes alone: any layout, drafter, sampling, lengths, joining and
leaving at any time; and models that cannot share passes are told apart."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any
from unittest import mock

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from mlx_lm.generate import generate_step
from mlx_lm.models.cache import BatchKVCache, KVCache

from mtp_mlx.decode.layout import Layout
from mtp_mlx.decode.lookup import LookupDrafter
from mtp_mlx.decode.loop import DecodeLoop, mtp_generate_step, open_loop
from mtp_mlx.decode.pick import Picker, SamplingConfig
from mtp_mlx.decode.policy import ChainPolicy, FixedPolicy, Policy, Proposal
from mtp_mlx.decode.session import CacheSettings, Session
from mtp_mlx.decode.stats import DecodeStats
from mtp_mlx.decode.step import Token
from mtp_mlx.decode.tree import DraftTree
from mtp_mlx.drafters.ptp.weights import PTPAdapter
from mtp_mlx.model.attach import AttachedModel, attach
from mtp_mlx.serve import batch as batch_module
from mtp_mlx.serve.batch import Batch, Member, why_not_batch
from mtp_mlx.serve.batch_plan import BatchDrafting, BatchPlan
from tests.decode.fakes import MOST_SLOTS, KnowingDrafter, attached, drafting, untouched
from tests.decode.test_loop import samplings
from tests.decode.trees import AnyTree, KnowingTrees
from tests.drafters.heads.test_chain import model_with_heads
from tests.drafters.heads.test_loop import Knowing
from tests.drafters.ptp.ptp_fakes import ptp_attached, ptp_drafting
from tests.tiny import VOCABULARY, tiny_model

NEAR_TIE = 1e-3  # logits of a padded pass and of one alone differ by rounding
EXAMPLES = 24
ARCHITECTURES = ["llama", "qwen3", "phi3", "olmo2", "granite", "qwen3_moe"]


@dataclass(frozen=True)
class Text:
    """One sequence: what it starts from, how it is picked, when it joins, how good its drafts are."""

    prompt: tuple[int, ...]
    max_tokens: int
    sampling: SamplingConfig
    joins: int
    acceptance: float | None
    alone_after: int | None = None  # shared steps after which it leaves and goes on by itself


@st.composite
def texts(draw: Any) -> Text:
    token = st.integers(0, VOCABULARY - 1)
    return Text(
        prompt=tuple(draw(st.lists(token, min_size=1, max_size=20))),
        max_tokens=draw(st.integers(1, 16)),
        sampling=draw(samplings()),
        joins=draw(st.integers(0, 4)),
        acceptance=draw(st.sampled_from([None, 0.5, 0.9, 1.0])),
        alone_after=draw(st.sampled_from([None, None, 1, 3])),
    )


def expected(model: AttachedModel, text: Text, bare: Any = None) -> list[Token]:
    """Plain decoding alone: by mlx-lm itself where it can be asked for the same, by our plain loop otherwise."""
    sampling = text.sampling
    if bare is not None and sampling == SamplingConfig(seed=sampling.seed):
        steps = generate_step(mx.array(text.prompt), bare, max_tokens=text.max_tokens)
        return [Token(token, logprobs, False, 0) for token, logprobs in steps]
    return list(mtp_generate_step(list(text.prompt), model, max_tokens=text.max_tokens, sampling=sampling))


class Running:
    """One sequence on its way through a batch."""

    def __init__(
        self, model: AttachedModel, text: Text, policy: Policy, truth: list[int], lookup: bool
    ) -> None:
        self.text, self.cache = text, model.make_cache()
        with ExitStack() as stack:
            if text.acceptance is not None:
                start, seed = len(text.prompt), text.sampling.seed % 1000
                if isinstance(model.speculator, PTPAdapter):
                    stack.enter_context(ptp_drafting(truth, start, text.acceptance, seed))
                else:
                    stack.enter_context(drafting(KnowingDrafter(truth, start, text.acceptance, seed)))
            session, loop = open_loop(
                list(text.prompt),
                model,
                max_tokens=text.max_tokens,
                sampling=text.sampling,
                policy=policy,
                lookup=LookupDrafter(3, 1) if lookup else None,
                emission=None,
                cache=self.cache,
                settings=CacheSettings(prefill_step_size=8),
                stats=DecodeStats(),
                constraint=None,
            )
        assert isinstance(loop, DecodeLoop)
        if isinstance(session.drafter, Knowing):
            session.drafter.truth = (len(text.prompt), truth)
        self.session, self.loop = session, loop
        self.member: Member | None = None
        self.tokens: list[Token] = []
        self.steps = 0

    @property
    def done(self) -> bool:
        return len(self.tokens) >= self.text.max_tokens


def together(
    model: AttachedModel,
    cases: list[Text],
    plan: BatchPlan,
    policies: list[Policy],
    truths: list[list[int]],
    lookup: bool,
) -> list[Running]:
    """Runs all texts to their ends; those whose time has come share passes."""
    batch = Batch(model, plan)
    running = [Running(model, *each, lookup) for each in zip(cases, policies, truths)]
    for clock in range(1000):
        for one in running:
            if one.text.joins == clock:
                one.session.prefill()
                one.member = batch.join(one.session, one.loop)
        if not batch.members:
            if clock > max(text.joins for text in cases):
                return running
            continue
        members = list(batch.members)
        for member, tokens in zip(members, batch.step(), strict=True):
            one = next(each for each in running if each.member is member)
            one.tokens += tokens
            one.steps += 1
            if one.done or one.steps == one.text.alone_after:
                batch.leave(member)
                one.tokens += [] if one.done else list(one.loop.tokens())
                one.session.settle(len(one.text.prompt) + len(one.tokens))
    raise AssertionError("no end")


def check(model: AttachedModel, running: list[Running], truths: list[list[Token]]) -> None:
    """Every text and every cache is what it would be alone, unless two logits nearly tie."""
    for one, truth in zip(running, truths, strict=True):
        assert len(one.tokens) == one.text.max_tokens
        found, right = [token.token for token in one.tokens], [token.token for token in truth]
        if found != right:
            parted = next(i for i, pair in enumerate(zip(found, right, strict=True)) if pair[0] != pair[1])
            off = centred(one.tokens[parted].logits) - centred(truth[parted].logits)
            assert np.abs(off).max() < NEAR_TIE, f"other logits at token {parted} of {one.text}"
            continue
        for token, other in zip(one.tokens, truth, strict=True):
            assert np.abs(centred(token.logits) - centred(other.logits)).max() < NEAR_TIE
        cache = model.make_cache()
        list(mtp_generate_step([*one.text.prompt, *right], model, max_tokens=1, prompt_cache=cache))
        for layer, own in zip(one.cache, cache, strict=True):
            assert type(layer) is KVCache and layer.offset == len(one.text.prompt) + len(right)
            keys, theirs = (np.array(each.state[0])[:, :, : layer.offset] for each in (layer, own))
            assert np.abs(keys - theirs).max() < NEAR_TIE * max(1, np.abs(theirs).max())


def centred(logits: mx.array) -> np.ndarray:
    """Logits or log-probabilities alike."""
    values = np.array(logits.astype(mx.float32))
    return values - values.max()


def plan_for(layout: str, slots: int, lookup: bool) -> BatchPlan:
    name: Any = layout
    return BatchPlan(BatchDrafting(name, slots=slots, lookup=slots if lookup else 0))


RELAXED = settings(
    max_examples=EXAMPLES,
    deadline=None,
    phases=(Phase.explicit, Phase.reuse, Phase.generate, Phase.shrink),
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)


@RELAXED
@given(
    st.sampled_from(ARCHITECTURES),
    st.lists(texts(), min_size=2, max_size=4),
    st.sampled_from(["plain", "linear", "quadratic"]),
    st.integers(1, MOST_SLOTS),
    st.booleans(),
)
def test_mask_slots(architecture: str, cases: list[Text], layout: str, slots: int, lookup: bool) -> None:
    model = attached(architecture)
    truths = [expected(model, text, untouched(architecture)) for text in cases]
    known = [[token.token for token in truth] for truth in truths]
    name: Any = layout
    policies: list[Policy] = [FixedPolicy(name, slots) for _ in cases]
    plan = plan_for(layout, slots, lookup and layout != "plain")
    check(model, together(model, cases, plan, policies, known, lookup), truths)


def test_shared_passes_take_the_likeliest_path_of_a_tree() -> None:
    tree = DraftTree((1, 2, 3), (-1, -1, 1), (0.2, 0.7, 0.5))
    loop = mock.Mock(proposals=lambda most: [Proposal("slots", tree)])
    (found,) = Member(mock.Mock(), loop).proposals(4)
    assert list(found.drafts) == [2, 3] and found.tree.is_chain


def test_drafters_of_trees() -> None:
    """The text stays the same where trees become chains in shared passes, and have branches again alone."""
    accepted, branched = [], []

    class Counting(AnyTree):
        def observe(self, proposal: Proposal, layout: Layout, tokens: Sequence[int], seconds: float) -> None:
            branched.append(not proposal.tree.is_chain)

    @settings(RELAXED, max_examples=40, derandomize=True, database=None)
    @given(
        st.sampled_from(ARCHITECTURES),
        st.lists(texts(), min_size=2, max_size=4),
        st.sampled_from(["linear", "quadratic"]),
        st.integers(1, MOST_SLOTS),
    )
    def law(architecture: str, cases: list[Text], layout: str, slots: int) -> None:
        model = attached(architecture)
        truths = [expected(model, text, untouched(architecture)) for text in cases]
        known = [[token.token for token in truth] for truth in truths]
        policies: list[Policy] = [Counting(slots, number) for number in range(len(cases))]
        with mock.patch(f"{__name__}.KnowingDrafter", KnowingTrees):
            running = together(model, cases, plan_for(layout, slots, False), policies, known, False)
        check(model, running, truths)
        accepted.append(sum(token.from_draft for one in running for token in one.tokens))

    law()
    assert sum(accepted) > 2 * len(accepted) and sum(branched) > len(accepted) // 2


@settings(RELAXED, max_examples=8)
@given(
    st.lists(texts(), min_size=2, max_size=3),
    st.sampled_from([("linear", "bits"), ("quadratic", "bits")]),
    st.sampled_from(["o", "c"]),
)
def test_parallel_token_prediction(cases: list[Text], form: tuple[str, str], variant: str) -> None:
    model = ptp_attached("qwen3", variant, form[1])
    name: Any = form[0]
    truths = [expected(model, text) for text in cases]
    known = [[token.token for token in truth] for truth in truths]
    policies: list[Policy] = [FixedPolicy(name, 2) for _ in cases]
    check(model, together(model, cases, plan_for(form[0], 2, False), policies, known, False), truths)


@settings(RELAXED, max_examples=10)
@given(st.lists(texts(), min_size=2, max_size=4), st.integers(1, 4), st.booleans(), st.integers(0, 3))
def test_mtp_heads(cases: list[Text], chain: int, lookup: bool, shape: int) -> None:
    model = model_with_heads("qwen3", 1 if shape else 2, 4, shape=shape)
    truths = [expected(model, text) for text in cases]
    known = [[token.token for token in truth] for truth in truths]
    plan = BatchPlan(BatchDrafting("linear", chain=chain, lookup=chain if lookup else 0))
    policies: list[Policy] = [ChainPolicy(chain) for _ in cases]
    with mock.patch("mtp_mlx.drafters.heads.cascade.HeadChain", Knowing):
        running = together(model, cases, plan, policies, known, lookup)
    check(model, running, truths)


def test_drafts_are_accepted_each_by_its_own_number() -> None:
    """Good and bad drafts side by side: the good sequence takes few steps, the bad one many."""
    model = attached("qwen3")
    cases = [Text((5, 9, 2), 24, SamplingConfig(), 0, accepted) for accepted in (1.0, 0.0)]
    truths = [expected(model, text) for text in cases]
    known = [[token.token for token in truth] for truth in truths]
    policies: list[Policy] = [FixedPolicy("quadratic", 3) for _ in cases]
    good, bad = together(model, cases, plan_for("quadratic", 3, False), policies, known, False)
    assert good.steps <= 8 and bad.steps >= 20
    check(model, [good, bad], truths)


def test_padding_is_cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sequences that accept by turns push each other to the right; the cache does not grow with it."""
    monkeypatch.setattr(batch_module, "CUT_PADDING_AT", 4)
    model = attached("llama")
    cases = [Text((5, 9, 2 + i), 60, SamplingConfig(seed=i), 0, 0.6) for i in range(2)]
    truths = [expected(model, text) for text in cases]
    known = [[token.token for token in truth] for truth in truths]
    cut: list[int] = []
    real = BatchKVCache.filter

    def counting(cache: BatchKVCache, indices: Any) -> None:
        real(cache, indices)
        cut.append(min(cache.left_padding.tolist()))

    monkeypatch.setattr(BatchKVCache, "filter", counting)
    policies: list[Policy] = [FixedPolicy("quadratic", 2) for _ in cases]
    check(model, together(model, cases, plan_for("quadratic", 2, False), policies, known, False), truths)
    assert cut and not any(
        cut
    )  # once or more in every layer  # the first that leaves makes two calls, one a layer


# --- who can share ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_these_can(architecture: str) -> None:
    assert why_not_batch(attached(architecture)) == ""


@pytest.mark.parametrize("architecture", ["gemma3_text", "qwen3_next", "rwkv7"])
def test_windows_and_recurrent_state_cannot(architecture: str) -> None:
    assert "cannot be rolled" in why_not_batch(attach(tiny_model(architecture, seed=3)))


def test_a_model_whose_attention_takes_a_batch_s_mask_for_that_of_its_heads_cannot() -> None:
    """mlx-lm's gemma2 at this version."""
    assert "other results" in why_not_batch(attached("gemma2"))


def test_exact_decoding_cannot() -> None:
    assert "exact" in why_not_batch(attach(tiny_model("llama", seed=3), exact=True))


def test_a_model_that_ignores_padding_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(BatchKVCache, "make_mask", lambda *_, **__: None)
    assert "other results" in why_not_batch(attached("llama"))


def test_a_sequence_s_keys_are_in_one_place() -> None:
    """Joining does not keep a second copy."""
    model = attached("llama")
    session = Session(model, Picker(), [1, 2, 3], model.make_cache(), CacheSettings())
    session.prefill()
    Batch(model, plan_for("plain", 0, False)).join(session, mock.Mock())
    assert session.cached == 0
