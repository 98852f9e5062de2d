"""With sliding windows and recurrent state the text is that of a run that never drafted, whatever is rejected.

Greedy tokens are compared with mlx-lm's own on a model that was never attached to, sampled ones with our plain loop.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mlx_lm.generate import generate_step
from mlx_lm.models.cache import ArraysCache, CacheList, KVCache, RotatingKVCache, make_prompt_cache

from mtp_mlx.decode.layout import Layout
from mtp_mlx.decode.lookup import LookupDrafter
from mtp_mlx.decode.loop import Token, mtp_generate_step
from mtp_mlx.decode.pick import SamplingConfig
from mtp_mlx.decode.policy import FixedPolicy, Proposal
from mtp_mlx.decode.rollback import LayerCaches
from mtp_mlx.decode.stats import DecodeStats
from mtp_mlx.drafters.heads.cascade import MTPHeads
from mtp_mlx.model.attach import AttachedModel, attach
from tests.decode.fakes import MOST_SLOTS, KnowingDrafter, attached, drafting, untouched
from tests.drafters.heads.test_loop import Knowing, SometimesChain
from tests.drafters.heads.test_mtp_head import random_heads
from tests.tiny import RECURRENT, VOCABULARY, WINDOWED, tiny_model

EXAMPLES = 60
# A Mamba-2 scan over several rows sums in another order than one over one row; other rows differ by less.
NEAR_TIE = {"nemotron_h": 1e-3, "falcon_h1": 1e-3, "granitemoehybrid": 1e-3}
# Heads are made like the last layer, which must have keys and values.
WITH_HEADS = ["gemma3_text", "olmo3", "gpt_oss", "qwen3_next", "qwen3_5", "nemotron_h", "granitemoehybrid"]
WITH_HEADS += ["olmo_hybrid", "lfm2"]
SUPPORTED = [*WINDOWED, *(name for name in RECURRENT if name != "recurrent_gemma")]


@lru_cache(maxsize=32)
def bare(architecture: str, exact: bool = False) -> AttachedModel:
    """A tiny model without anything that drafts."""
    return attach(tiny_model(architecture, seed=3), exact=exact)


@lru_cache(maxsize=32)
def with_heads(architecture: str, count: int) -> AttachedModel:
    """A tiny model with random heads."""
    model = tiny_model(architecture, seed=3)
    return attach(model, MTPHeads(random_heads(model, count).heads, random_heads(model, 1).convention))


class KnowingLookup(LookupDrafter):
    """A lookup that knows the text, but for the positions whose bit in `wrong` is set."""

    def __init__(self, truth: list[int], start: int, wrong: tuple[bool, ...]) -> None:
        super().__init__(3, 1)
        self._truth, self._start, self._wrong = truth, start, wrong

    def propose(self, most: int) -> tuple[list[int], int]:
        """See `LookupDrafter.propose`."""
        first = len(self._tokens) - self._start
        return [
            (token + self._wrong[(first + index) % len(self._wrong)]) % VOCABULARY
            for index, token in enumerate(self._truth[first : first + most])
        ], 3


class Uneven:
    """Verifies blocks of all sizes, plain stretches of a few tokens in between."""

    own_drafts = 0
    verdict = ""

    def __init__(self, most: int) -> None:
        self.max_drafts, self._asked = most, 0

    def begin(self, context: int, *, branches: bool = True) -> None:
        """Nothing to plan."""

    def choose(self, proposals: list[Proposal]) -> tuple[Proposal, Layout]:
        """See `Policy`."""
        self._asked += 1
        best = max(proposals, key=lambda proposal: len(proposal.drafts))
        best = best.cut((self.max_drafts, 0, 2, self.max_drafts, 1)[self._asked % 5])
        return best, Layout(len(best.drafts), (0,) * (len(best.drafts) + 1))

    def observe(self, *_: Any) -> None:
        """Nothing to learn."""

    def interrupts_plain(self) -> bool:
        """Every other time."""
        self._asked += 1
        return self._asked % 2 == 0


@dataclass(frozen=True)
class Case:
    """One drawn setting."""

    architecture: str
    prompt: tuple[int, ...]
    max_tokens: int
    prefill_step_size: int
    temperature: float
    seed: int
    exact: bool
    heads: int
    wrong: tuple[bool, ...]
    most: int

    def options(self) -> dict[str, Any]:
        return {
            "max_tokens": self.max_tokens,
            "prefill_step_size": self.prefill_step_size,
            "sampling": SamplingConfig(temperature=self.temperature, seed=self.seed),
        }

    def model(self) -> AttachedModel:
        return (
            with_heads(self.architecture, self.heads) if self.heads else bare(self.architecture, self.exact)
        )

    def expected(self) -> tuple[list[int], list[mx.array]]:
        """Tokens and log-probabilities of a run that never drafted."""
        if self.temperature:
            found = list(mtp_generate_step(list(self.prompt), self.model(), **self.options()))
            return [item.token for item in found], [item.logits for item in found]
        theirs = generate_step(
            mx.array(self.prompt),
            untouched(self.architecture),
            max_tokens=self.max_tokens,
            prefill_step_size=self.prefill_step_size,
        )
        pairs = list(theirs)
        return [int(token) for token, _ in pairs], [logprobs for _, logprobs in pairs]

    def run(self, truth: list[int], stats: DecodeStats, cache: list[Any]) -> list[Token]:
        """Tokens of the loop under test."""
        policy: Any = SometimesChain(self.heads + 1) if self.heads else Uneven(self.most)
        with pytest.MonkeyPatch.context() as patch:
            if self.heads:
                patch.setattr(Knowing, "truth", (len(self.prompt), truth))
                patch.setattr("mtp_mlx.drafters.heads.cascade.HeadChain", Knowing)
            return list(
                mtp_generate_step(
                    list(self.prompt),
                    self.model(),
                    policy=policy,
                    lookup=None if self.heads else KnowingLookup(truth, len(self.prompt), self.wrong),
                    stats=stats,
                    prompt_cache=cache,
                    **self.options(),
                )
            )


@st.composite
def cases(draw: Any) -> Case:
    """Any architecture, accept and reject pattern, prompt and sampling."""
    heads = draw(st.sampled_from([0, 0, 1, 3]))
    architecture = draw(st.sampled_from(WITH_HEADS if heads else SUPPORTED))
    tokens = st.integers(0, VOCABULARY - 1)
    return Case(
        architecture=architecture,
        prompt=tuple(draw(st.lists(tokens, min_size=1, max_size=24))),
        max_tokens=draw(st.sampled_from([18, 1, 2, 9, 25])),
        prefill_step_size=draw(st.sampled_from([1, 3, 8, 2048])),
        temperature=draw(st.sampled_from([0.0, 0.8])),
        seed=draw(st.integers(0, 2**40)),
        exact=not heads and architecture != "gpt_oss" and draw(st.booleans()),
        heads=heads,
        wrong=tuple(draw(st.lists(st.booleans(), min_size=1, max_size=6))),
        most=draw(st.integers(1, 9)),
    )


def held(cache: list[Any]) -> set[type]:
    """Kinds of a prompt cache's caches."""
    return {
        type(leaf) for layer in cache for leaf in (layer.caches if isinstance(layer, CacheList) else [layer])
    }


def test_same_text() -> None:
    """The law of the package, for caches that are not trimmed. Certificates are counted and must be rare."""
    certificates: list[Case] = []
    examples = accepted = rejected = 0

    @settings(
        max_examples=EXAMPLES,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
    )
    @given(cases())
    def law(case: Case) -> None:
        nonlocal examples, accepted, rejected
        expected, logits = case.expected()
        stats, cache = DecodeStats(), case.model().make_cache()
        items = case.run(expected, stats, cache)
        examples += 1
        accepted += sum(stats.accepted)
        rejected += sum(stats.submitted) - sum(stats.accepted)
        assert len(items) == stats.tokens == case.max_tokens
        assert held(cache) <= {KVCache, RotatingKVCache, ArraysCache}
        offsets = {leaf.offset for leaf in cache if hasattr(leaf, "offset")}
        assert offsets <= {len(case.prompt) + case.max_tokens}
        tokens = [item.token for item in items]
        if tokens == expected:
            return
        parted = next(i for i, pair in enumerate(zip(tokens, expected, strict=True)) if len(set(pair)) > 1)
        own = items[parted].logits - mx.logsumexp(items[parted].logits)
        theirs = logits[parted] - mx.logsumexp(logits[parted])
        gap = float(mx.abs(own - theirs).max())
        assert gap < NEAR_TIE.get(case.architecture, 1e-4), (case, parted, gap, tokens, expected)
        certificates.append(case)

    law()
    print(
        f"{examples} examples, {accepted} drafts accepted, {rejected} rejected, {len(certificates)} near ties"
    )
    assert accepted > 2 * examples and rejected > examples, "both must happen often, or nothing is tested"
    assert len(certificates) <= examples // 50, certificates


@pytest.mark.parametrize("name", ["gemma3_text", "olmo3", "qwen3_next", "nemotron_h", "falcon_h1"])
def test_a_run_without_roll_back_parts_from_the_text(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The law is not empty: rejected rows that stay in windows and states are seen in the text."""
    case = Case(name, (3, 5, 7, 11, 90, 2, 4), 30, 2048, 0.0, 0, False, 0, (False, True, False), 5)
    truth, _ = case.expected()
    keep = LayerCaches.keep

    def careless(self: LayerCaches, n_rows: int) -> None:
        windows_and_states = [leaf for leaf in self._leaves() if type(leaf) is not KVCache]
        keys = [(leaf, getattr(leaf, "cache", None) and list(leaf.cache)) for leaf in windows_and_states]
        rows = [
            (getattr(leaf, "keys", None), getattr(leaf, "values", None), getattr(leaf, "_end", 0))
            for leaf, _ in keys
        ]
        keep(self, n_rows)
        for (leaf, state), (_, _, end) in zip(keys, rows, strict=True):
            if state:
                leaf.cache[:] = state
            else:
                leaf._end = end

    monkeypatch.setattr(LayerCaches, "keep", careless)
    found = case.run(truth, DecodeStats(), case.model().make_cache())
    assert [item.token for item in found] != truth


@pytest.mark.parametrize("name", WINDOWED)
@pytest.mark.parametrize("layout", ["linear", "quadratic"])
def test_mask_tokens_past_a_window(name: str, layout: Any) -> None:
    """Slots see the window of where they stand, and leave it whole."""
    prompt = [3, 5, 7, 11, 90, 2, 4, 8, 9]
    model = attached(name)
    truth = [int(t) for t, _ in generate_step(mx.array(prompt), untouched(name), max_tokens=40)]
    for probability in (0.5, 0.9):
        stats = DecodeStats()
        with drafting(KnowingDrafter(truth, len(prompt), probability, 1)):
            policy = FixedPolicy(layout, MOST_SLOTS)
            found = list(mtp_generate_step(prompt, model, max_tokens=40, policy=policy, stats=stats))
        assert [item.token for item in found] == truth
        assert stats.steps < 36 and stats.layouts


@pytest.mark.parametrize("name", ["gemma3_text", "qwen3_next", "qwen3_5", "nemotron_h", "falcon_h1"])
@pytest.mark.parametrize("stop_after", [1, 2, 3, 5, 11])
def test_a_reused_cache_goes_on_with_the_same_text(name: str, stop_after: int) -> None:
    """Closed at any token of a block; then mlx-lm goes on with the cache, and so do we."""
    prompt, more = [3, 5, 7, 11, 90, 2, 4], [8, 9, 7]
    model, plain = bare(name), untouched(name)
    truth = [int(t) for t, _ in generate_step(mx.array(prompt), plain, max_tokens=20)]
    text = mx.array([*prompt, *truth[:stop_after], *more])
    expected = [int(t) for t, _ in generate_step(text, plain, max_tokens=12)]
    for ours in (False, True):
        cache = make_prompt_cache(plain)
        lookup = KnowingLookup(truth, len(prompt), (False, False, True))
        steps = mtp_generate_step(prompt, model, policy=Uneven(4), lookup=lookup, prompt_cache=cache)
        assert [next(steps).token for _ in range(stop_after)] == truth[:stop_after]
        steps.close()
        assert held(cache) <= {KVCache, RotatingKVCache, ArraysCache}
        if ours:
            again = KnowingLookup(expected, len(more), (False, True))
            went = mtp_generate_step(
                more, model, policy=Uneven(4), lookup=again, prompt_cache=cache, max_tokens=12
            )
            assert [item.token for item in went] == expected
        else:
            theirs = generate_step(mx.array(more), plain, prompt_cache=cache, max_tokens=12)
            assert [int(token) for token, _ in theirs] == expected


@pytest.mark.parametrize("name", ["gemma3_text", "qwen3_next", "granitemoehybrid"])
@pytest.mark.parametrize("interrupted", [1, 4, 9])
def test_ctrl_c_inside_a_pass(name: str, interrupted: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The cache then holds a beginning of the text, and says how long it is; mlx-lm goes on from there."""
    prompt = [3, 5, 7, 11, 90, 2, 4]
    model, plain = bare(name), untouched(name)
    truth = [int(t) for t, _ in generate_step(mx.array(prompt), plain, max_tokens=30)]
    cache, passes = make_prompt_cache(plain), 0
    layer = next(m for path, m in model.model.named_modules() if path.endswith("layers.2"))
    call = type(layer).__call__

    def cut_short(self: Any, *args: Any, **kwargs: Any) -> Any:
        nonlocal passes
        passes += self is layer
        if self is layer and passes == interrupted:
            raise KeyboardInterrupt
        return call(self, *args, **kwargs)

    monkeypatch.setattr(type(layer), "__call__", cut_short)
    lookup = KnowingLookup(truth, len(prompt), (False, False, True))
    with pytest.raises(KeyboardInterrupt):
        list(
            mtp_generate_step(
                prompt, model, policy=Uneven(4), lookup=lookup, prompt_cache=cache, prefill_step_size=3
            )
        )
    monkeypatch.undo()
    offset = {leaf.offset for leaf in cache if hasattr(leaf, "offset")}
    assert len(offset) == 1 and held(cache) <= {KVCache, RotatingKVCache, ArraysCache}
    whole = [*prompt, *truth]
    rest = generate_step(
        mx.array(whole[offset.pop() : len(prompt) + 20]), plain, prompt_cache=cache, max_tokens=9
    )
    assert [int(token) for token, _ in rest] == truth[20:29]


def test_a_hybrid_cache_is_quantised_where_mlx_lm_does() -> None:
    """Layers with keys and values are, states are not; a block does not straddle the border."""
    overrides = {"hidden_size": 64, "head_dim": 32}
    model, plain = (
        attach(tiny_model("qwen3_next", seed=3, **overrides)),
        tiny_model("qwen3_next", seed=3, **overrides),
    )
    options: dict[str, Any] = {"kv_bits": 8, "kv_group_size": 32, "quantized_kv_start": 14, "max_tokens": 25}
    prompt = [3, 5, 7, 11, 90, 2, 4]
    truth = [int(t) for t, _ in generate_step(mx.array(prompt), plain, **options)]
    lookup = KnowingLookup(truth, len(prompt), (False, False, False, True))
    stats = DecodeStats()
    found = list(mtp_generate_step(prompt, model, policy=Uneven(6), lookup=lookup, stats=stats, **options))
    assert [item.token for item in found] == truth and stats.steps < 22


def test_the_plain_path_is_mlx_lm_bit_for_bit_up_to_the_window() -> None:
    """Windows that were never full and all recurrent state: the very logits of mlx-lm."""
    for name, most in [("gemma3_text", 2), ("qwen3_next", 30), ("nemotron_h", 30)]:
        prompt = [3, 5, 7]
        seen: list[mx.array] = []
        theirs = generate_step(
            mx.array(prompt),
            untouched(name),
            max_tokens=most,
            logits_processors=[lambda _, logits: seen.append(logits[0]) or logits],  # noqa: B023
        )
        tokens = [int(token) for token, _ in theirs]
        found = list(mtp_generate_step(prompt, bare(name), max_tokens=most))
        assert [item.token for item in found] == tokens
        for item, logits in zip(found, seen, strict=False):
            np.testing.assert_array_equal(np.array(item.logits), np.array(logits))


@pytest.mark.parametrize("name", ["gemma3_text", "olmo3", "ministral3", "qwen3_next", "nemotron_h"])
def test_exact_decoding_gives_the_logits_of_plain_decoding_bit_for_bit(name: str) -> None:
    """Past the window and behind rejected rows too."""
    prompt = (3, 5, 7, 11, 90, 2, 4)
    case = Case(name, prompt, 30, 2048, 0.0, 0, True, 0, (False, False, True), 5)
    plain = list(mtp_generate_step(list(prompt), bare(name, exact=True), max_tokens=30))
    truth, stats = [item.token for item in plain], DecodeStats()
    found = case.run(truth, stats, case.model().make_cache())
    assert stats.steps < 26 and [item.token for item in found] == truth
    for one, other in zip(found, plain, strict=True):
        np.testing.assert_array_equal(np.array(one.logits), np.array(other.logits))
