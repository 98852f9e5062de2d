"""The text with MTP heads is that of plain decoding, whatever heads draft and however a prompt is read."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mlx_lm.generate import generate_step

from mtp_mlx.decode.drafter import LazyDrafts, Verified
from mtp_mlx.decode.layout import Layout
from mtp_mlx.decode.lookup import LookupDrafter
from mtp_mlx.decode.loop import Token, mtp_generate_step, speculative_step
from mtp_mlx.decode.pick import Picker, SamplingConfig
from mtp_mlx.decode.policy import ChainPolicy, FixedPolicy, Proposal
from mtp_mlx.decode.session import CacheSettings, Session
from mtp_mlx.decode.stats import DecodeStats
from mtp_mlx.drafters.heads.chain import HeadChain
from mtp_mlx.drafters.heads.convention import HeadConvention
from mtp_mlx.drafters.heads.medusa import MedusaHead, MedusaHeads
from mtp_mlx.errors import MTPError
from mtp_mlx.model.attach import attach
from mtp_mlx.planning.budget import ChainBudgetPolicy
from mtp_mlx.planning.choose import build_policy
from tests.decode.fakes import attached as with_mask_adapter
from tests.decode.fakes import untouched
from tests.decode.test_loop import Case, certified, plain_tokens
from tests.drafters.heads.test_chain import SHAPES, model_with_heads
from tests.drafters.heads.test_mtp_head import random_heads
from tests.planning.test_budget import cost_of
from tests.tiny import VOCABULARY, tiny_model

EXAMPLES = 100


class Knowing(HeadChain):
    """A chain that runs its heads, then drafts the true text instead, wrong at every `wrong`-th position."""

    truth: tuple[int, list[int]] = (0, [])
    wrong = 4

    def propose(self, verified: Verified) -> LazyDrafts:
        """See `HeadChain.propose`."""
        own = super().propose(verified)
        start, tokens = self.truth
        known = [
            (token + (index % self.wrong == self.wrong - 1)) % VOCABULARY
            for index, token in enumerate([*tokens, *[0] * 32])
        ]
        table = mx.array([0] * start + known, dtype=mx.int32)
        after = verified.position + 1 + mx.arange(len(own.ids))
        return LazyDrafts(table[mx.minimum(after, len(table) - 1)] + 0 * own.ids, own.confidences)


class SometimesChain:
    """Plain, short chains, long chains and none at all, in turn: every kind of step after every other."""

    def __init__(self, chain: int) -> None:
        self.max_drafts = self.own_drafts = chain
        self.verdict, self._asked, self._plain = "", 0, 0

    def begin(self, context: int, *, branches: bool = True) -> None:
        """Nothing to plan."""

    def choose(self, proposals: list[Proposal]) -> tuple[Proposal, Layout]:
        self._asked += 1
        best = max(proposals, key=lambda proposal: len(proposal.drafts)).cut(self.max_drafts)
        kind = self._asked * 7 % 5
        if kind == 0:
            return best.cut(0), Layout.plain()
        return best, Layout.chained(
            len(best.drafts), (0, self.own_drafts, 1, self.own_drafts, 2)[kind] % (self.own_drafts + 1)
        )

    def observe(self, *_: Any) -> None:
        self._plain += 1

    def interrupts_plain(self) -> bool:
        return self._plain % 3 == 0


@dataclass(frozen=True)
class HeadsCase:
    """One drawn setting."""

    case: Case
    heads: int
    drafts: int
    knowing: bool
    policy: str
    shape: int = 0

    def run(self, truth: list[int], stats: DecodeStats, patch: pytest.MonkeyPatch) -> list[Token]:
        """Tokens of the loop under test."""
        made: dict[str, Callable[[int], Any]] = {
            "chain": ChainPolicy,
            "sometimes": SometimesChain,
            "auto": lambda chain: ChainBudgetPolicy(cost_of(0.1, draft=0.02), chain, [], "heads"),
        }
        if self.knowing:
            patch.setattr(Knowing, "truth", (len(self.case.prompt), truth))
            patch.setattr("mtp_mlx.drafters.heads.cascade.HeadChain", Knowing)
        return list(
            mtp_generate_step(
                list(self.case.prompt),
                model_with_heads(self.case.architecture, self.heads, self.drafts, shape=self.shape),
                max_tokens=self.case.max_tokens,
                sampling=self.case.sampling,
                policy=made[self.policy](self.drafts),
                lookup=LookupDrafter(3, 1) if self.case.lookup else None,
                stats=stats,
                **self.case.cache_options(),
            )
        )


@st.composite
def cases(draw: Any) -> HeadsCase:
    """Anything the loop can be asked for with heads."""
    tokens = st.integers(0, VOCABULARY - 1)
    repeated = st.lists(tokens, min_size=2, max_size=5).map(lambda part: (part * 12)[:40])
    case = Case(
        architecture=draw(st.sampled_from(["llama", "qwen2", "qwen3"])),
        prompt=tuple(draw(st.one_of(st.lists(tokens, min_size=1, max_size=30), repeated))),
        max_tokens=draw(st.sampled_from([24, 1, 2, 7, 18])),
        layout="plain",
        slots=1,
        lookup=draw(st.booleans()),
        acceptance=None,
        prefill_step_size=draw(st.sampled_from([1, 3, 8, 2048])),
        kv_bits=None,
        quantized_kv_start=5000,
        sampling=SamplingConfig(
            temperature=draw(st.sampled_from([0.0, 0.8])),
            seed=draw(st.integers(0, 2**40)),
            repetition_penalty=draw(st.sampled_from([1.0, 1.0, 1.3])),
        ),
    )
    heads, policies = draw(st.integers(1, 3)), st.sampled_from(["chain", "sometimes", "auto"])
    drafts, knowing = draw(st.sampled_from([heads, 4])), draw(st.booleans())
    return HeadsCase(case, heads, drafts, knowing, draw(policies), draw(st.integers(0, len(SHAPES) - 1)))


def test_same_text() -> None:
    """The law of the package, with heads. Certificates of near ties are counted and must be rare."""
    certificates: list[HeadsCase] = []
    examples = accepted = 0

    @settings(
        max_examples=EXAMPLES,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
    )
    @given(cases())
    def law(drawn: HeadsCase) -> None:
        nonlocal examples, accepted
        expected, logits = plain_tokens(drawn.case)
        stats = DecodeStats()
        with pytest.MonkeyPatch.context() as patch:
            items = drawn.run(expected, stats, patch)
        tokens = [item.token for item in items]
        examples += 1
        accepted += stats.drafted_by["heads"]
        assert len(tokens) == stats.tokens == drawn.case.max_tokens
        assert stats.steps + sum(stats.drafted_by.values()) == len(tokens)
        assert set(stats.drafted_by) <= {"heads", "lookup"}
        if tokens != expected:
            parted = next(
                i for i, pair in enumerate(zip(tokens, expected, strict=True)) if len(set(pair)) > 1
            )
            assert certified(drawn.case, logits, items, parted), (parted, tokens, expected)
            certificates.append(drawn)

    law()
    print(f"{examples} examples, {accepted} drafts of heads accepted, {len(certificates)} near ties")
    assert accepted > examples, "heads must be accepted often, or nothing is tested"
    assert len(certificates) <= examples // 50, certificates


def test_heads_that_know_the_text_save_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case("llama", (3, 1, 4), 21, "plain", 1, False, None, 2048, None, 0, SamplingConfig())
    expected, _ = plain_tokens(case)
    monkeypatch.setattr(Knowing, "wrong", 1000)
    stats = DecodeStats()
    items = HeadsCase(case, 2, 4, True, "chain").run(expected, stats, monkeypatch)
    assert [item.token for item in items] == expected
    assert stats.steps == 5 and stats.histogram == {1: 1, 5: 4} and stats.drafted_by == {"heads": 16}
    assert stats.layouts == {"0/4 heads": 1, "4/4 heads": 4} and stats.rows == 1 + 4 * 5


def test_one_host_read_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """Between two steps the host asks MLX for values once: head caches move without another look."""
    model = model_with_heads("qwen3", 3, 3)
    opened = partial(model.speculator.open, model, Picker(), 3)
    session = Session(model, Picker(), [3, 1, 4, 1, 5], model.make_cache(), CacheSettings(), opened)
    session.prefill()
    result = speculative_step(session, Layout.chained(0, 3), [])
    evaluate, reads = mx.eval, []
    monkeypatch.setattr(mx, "eval", lambda *arrays: reads.append(len(arrays)) or evaluate(*arrays))
    for _ in range(4):
        result = speculative_step(session, Layout.chained(3, 3), list(result.fresh.tokens))
        assert len(result.fresh) == len(result.fresh.chances) == 3
    assert len(reads) == 4


@pytest.mark.parametrize("stop_after", [1, 2, 5, 9])
def test_a_reused_cache_goes_on_with_the_same_text(stop_after: int) -> None:
    """Heads begin anew behind what the cache holds, and the text is that of mlx-lm over all of it."""
    model, prompt = model_with_heads("llama", 3, 3, 1), [3, 1, 4]
    cache = model.make_cache()
    steps = mtp_generate_step(prompt, model, policy=ChainPolicy(3), prompt_cache=cache)
    told = [next(steps).token for _ in range(stop_after)]
    steps.close()
    assert {layer.offset for layer in cache} == {len(prompt) + stop_after}
    more = mtp_generate_step([7, 8], model, policy=ChainPolicy(3), prompt_cache=cache, max_tokens=9)
    found = [item.token for item in more]
    text = mx.array([*prompt, *told, 7, 8])
    assert found == [token for token, _ in generate_step(text, untouched("llama"), max_tokens=9)]
    assert {layer.offset for layer in cache} == {len(text) + 9}


def test_policies_of_layouts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mtp_mlx.planning.choose.step_cost", lambda model: cost_of(0.1))
    model, stats = model_with_heads("llama", 2, 2), DecodeStats()
    assert isinstance(build_policy(model, "plain", None, stats), FixedPolicy)
    assert build_policy(model, "linear", None, stats).own_drafts == 2
    assert build_policy(model, "linear", 5, stats).own_drafts == 5 and not stats.fallbacks
    assert isinstance(build_policy(model, "plain", 5, stats), FixedPolicy)
    planner = build_policy(model, "auto", None, stats)
    assert isinstance(planner, ChainBudgetPolicy) and planner.own_drafts == 2 and not stats.fallbacks
    with pytest.raises(MTPError, match="is for slots, not for MTP heads"):
        build_policy(model, "quadratic", None, stats)
    with pytest.raises(MTPError, match="must be 1 to 16; got 17"):
        build_policy(model, "linear", 17, stats)


def test_a_short_chain_leaves_room_to_learn_about_longer_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    """What one generation with one draft begins, later ones with more go on with."""
    monkeypatch.setattr("mtp_mlx.planning.choose.step_cost", lambda model: cost_of(0.1))
    base = tiny_model("llama", seed=3)
    model, recorded = attach(base, random_heads(base, 2)), [0.9, 0.4, 0.1, 0.05]
    model.info = SimpleNamespace(acceptance=recorded, acceptance_by_precision={})
    build_policy(model, "auto", 1, DecodeStats())
    planner = build_policy(model, "auto", 4, DecodeStats())
    known = model.experience.acceptance["heads"]
    assert [known.probability(depth) for depth in range(1, 5)] == pytest.approx(recorded)
    for _ in range(200):
        right = Proposal.chain("heads", [7] * 4, [0.5] * 4)
        planner.choose([right])
        planner.observe(right, Layout.chained(4, 4), [7, 7, 7, 7, 8], 1.0)
    assert known.probability(4) > 0.9


def test_layouts_that_the_model_has_no_drafter_for() -> None:
    """Slots for heads, a chain for slots, and drafts that no policy announced."""
    with pytest.raises(MTPError, match="no adapter with slots"):
        list(mtp_generate_step([5], model_with_heads("llama", 2, 2), policy=FixedPolicy("quadratic", 2)))
    for model, message in [
        (with_mask_adapter("llama"), "no drafter that makes one"),
        (model_with_heads("llama", 2, 2), "its policy has `own_drafts` 0"),
    ]:
        session = Session(model, Picker(), [3, 1], model.make_cache(), CacheSettings())
        with pytest.raises(MTPError, match=message):
            speculative_step(session, Layout.chained(0, 2), [])
    with pytest.raises(ValueError, match="cannot be combined with slots"):
        Layout(0, (2,), 2)


@pytest.mark.parametrize("kind", ["cascade", "medusa"])
def test_costs_measured_before_are_found_again(kind: str) -> None:
    """The key of step costs and tuned choices names heads as commit 4398f10 did, wherever their classes lie now."""
    if kind == "cascade":
        source: Any = model_with_heads("llama", 2, 2).speculator
    else:
        convention = HeadConvention("test", "medusa", "", lm_head="own", output_norm="identity")
        source = MedusaHeads([MedusaHead(1, 48, VOCABULARY)], convention)
    key = source.cost_key(VOCABULARY)
    old = {"cascade": "mtp_mlx.model.mtp_head.MTPHead", "medusa": "mtp_mlx.model.medusa_head.MedusaHead"}[
        kind
    ]
    assert f"'{old}'" in key and f"'{old}s'" in key and "mtp_mlx.drafters" not in key
