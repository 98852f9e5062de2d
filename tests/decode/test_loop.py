"""The text with several tokens per pass is that of plain decoding: every layout, drafter, cache and sampling.

Greedy tokens are compared with those of mlx-lm's `generate_step` on a model that was never attached to,
sampled ones with our plain loop. Where two runs part, a near tie may excuse it: the raw logits of both runs
at that position then differ by rounding only.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mlx_lm.generate import generate_step
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.sample_utils import make_logits_processors

from mtp_mlx.decode.lookup import LookupDrafter
from mtp_mlx.decode.loop import Token, mtp_generate_step, token_ids
from mtp_mlx.decode.pick import Picker, SamplingConfig
from mtp_mlx.decode.policy import FixedPolicy
from mtp_mlx.decode.stats import DecodeStats
from mtp_mlx.errors import MTPError
from tests.decode.fakes import MOST_SLOTS, KnowingDrafter, PlainWatching, attached, drafting, untouched
from tests.tiny import ARCHITECTURES, VOCABULARY

NEAR_TIE = 1e-4  # logits closer than this may swap places by rounding
QUANTISED_NEAR_TIE = 0.05  # a key rounded to the next step of a quantised cache moves logits more
EXAMPLES = 300
QUANTISABLE = {"hidden_size": 64, "intermediate_size": 96, "head_dim": 32}


@dataclass(frozen=True)
class Case:
    """One drawn setting of the decode loop."""

    architecture: str
    prompt: tuple[int, ...]
    max_tokens: int
    layout: str
    slots: int
    lookup: bool
    acceptance: float | None  # of the drafter that knows the text; None drafts with the adapter itself
    prefill_step_size: int
    kv_bits: int | None
    quantized_kv_start: int
    sampling: SamplingConfig

    def model(self) -> Any:
        return attached(self.architecture, **(QUANTISABLE if self.kv_bits else {}))

    def untouched(self) -> Any:
        return untouched(self.architecture, **(QUANTISABLE if self.kv_bits else {}))

    def cache_options(self) -> dict[str, Any]:
        return {
            "prefill_step_size": self.prefill_step_size,
            "kv_bits": self.kv_bits,
            "kv_group_size": 32,
            "quantized_kv_start": self.quantized_kv_start,
        }


@st.composite
def samplings(draw: Any) -> SamplingConfig:
    """Greedy or sampled, with and without warps and penalties."""
    penalty = draw(st.sampled_from([1.0, 1.0, 1.3]))
    config = SamplingConfig(
        temperature=draw(st.sampled_from([0.0, 0.0, 0.5, 0.8, 1.3])),
        seed=draw(st.integers(0, 2**40)),
        repetition_penalty=penalty,
        repetition_context_size=draw(st.sampled_from([1, 5, 20])),
        presence_penalty=draw(st.sampled_from([0.0, 0.0, 0.5])),
    )
    warp = draw(st.sampled_from([{}, {"top_k": 7}, {"top_p": 0.9}, {"min_p": 0.05}]))
    return replace(config, **warp)


@st.composite
def cases(draw: Any) -> Case:
    """Anything the loop can be asked for."""
    kv_bits = draw(st.sampled_from([None, None, 8, 4]))
    # head_dim is an option of these; it has to be a multiple of the group size
    names = ["llama", "qwen3", "mistral", "olmo2"] if kv_bits else ARCHITECTURES
    tokens = st.integers(0, VOCABULARY - 1)
    repeated = st.lists(tokens, min_size=2, max_size=5).map(lambda part: (part * 12)[:40])
    return Case(
        architecture=draw(st.sampled_from(names)),
        prompt=tuple(draw(st.one_of(st.lists(tokens, min_size=1, max_size=40), repeated))),
        max_tokens=draw(st.sampled_from([24, 1, 2, 7, 12, 18, 30])),
        layout=draw(st.sampled_from(["quadratic", "linear", "quadratic", "linear", "plain"])),
        slots=draw(st.integers(1, MOST_SLOTS)),
        lookup=draw(st.booleans()),
        acceptance=draw(st.sampled_from([0.9, None, 0.6, 0.9, 1.0])),
        prefill_step_size=draw(st.sampled_from([1, 3, 8, 2048])),
        kv_bits=kv_bits,
        quantized_kv_start=draw(st.sampled_from([0, 10, 20, 30, 5000])),
        sampling=draw(samplings()),
    )


def plain_tokens(case: Case, cache: list[Any] | None = None) -> tuple[list[int], list[mx.array]]:
    """Tokens and raw logits of mlx-lm itself when greedy, of our plain loop otherwise."""
    model, tokens, logits = case.model(), [], []
    if case.sampling.temperature == 0:
        for token, raw in _mlx_lm(case, cache):
            tokens.append(token)
            logits.append(raw)
        return tokens, logits
    for item in mtp_generate_step(
        list(case.prompt),
        model,
        max_tokens=case.max_tokens,
        sampling=case.sampling,
        prompt_cache=cache,
        **case.cache_options(),
    ):
        tokens.append(item.token)
        logits.append(item.logits)
    return tokens, logits


def _mlx_lm(case: Case, cache: list[Any] | None) -> Iterator[tuple[int, mx.array]]:
    seen: list[mx.array] = []

    def remember(_: mx.array, logits: mx.array) -> mx.array:
        seen.append(logits[0])
        return logits

    sampling = case.sampling
    processors = make_logits_processors(
        repetition_penalty=sampling.repetition_penalty if sampling.repetition_penalty != 1 else None,
        repetition_context_size=sampling.repetition_context_size,
        presence_penalty=sampling.presence_penalty or None,
    )
    steps = generate_step(
        mx.array(case.prompt),
        case.untouched(),
        max_tokens=case.max_tokens,
        logits_processors=[remember, *processors],
        prompt_cache=cache,
        **case.cache_options(),
    )
    for index, (token, _) in enumerate(steps):
        yield token, seen[index]


def run(case: Case, truth: list[int], cache: list[Any], stats: DecodeStats) -> list[Token]:
    """Tokens of the loop under test."""
    knowing = None
    if case.acceptance is not None:
        knowing = KnowingDrafter(truth, len(case.prompt), case.acceptance, case.sampling.seed % 1000)
    with drafting(knowing):
        return list(
            mtp_generate_step(
                list(case.prompt),
                case.model(),
                max_tokens=case.max_tokens,
                sampling=case.sampling,
                policy=FixedPolicy(case.layout, case.slots),  # type: ignore[arg-type]
                lookup=LookupDrafter(3, 1) if case.lookup else None,
                prompt_cache=cache,
                stats=stats,
                **case.cache_options(),
            )
        )


def certified(case: Case, expected: list[mx.array], found: list[Token], parted: int) -> bool:
    """Whether the runs part there by rounding only.

    Both runs saw the same logits up to rounding, and from its own logits the loop under test picked the token that
    a picker gives which knows nothing of blocks: by the text before it and the absolute position.
    """
    bound = QUANTISED_NEAR_TIE if case.kv_bits else NEAR_TIE
    item, picker = found[parted], Picker(case.sampling)
    text = [*case.prompt, *(earlier.token for earlier in found[:parted])]
    padded = [-1] * picker.history_size + text
    history = mx.array([padded[len(padded) - picker.history_size :]], dtype=mx.int32)
    pick = picker.pick(item.logits[None], mx.array([len(text)]), history)
    return bool(np.abs(np.array(expected[parted] - item.logits)).max() < bound and pick.item() == item.token)


def check_stats(case: Case, stats: DecodeStats, n_tokens: int) -> None:
    """Counts of one run add up."""
    assert stats.tokens == n_tokens == case.max_tokens
    assert sum(size * count for size, count in stats.histogram.items()) == n_tokens
    assert sum(stats.histogram.values()) == stats.steps == sum(stats.layouts.values())
    assert stats.steps + sum(stats.drafted_by.values()) == n_tokens
    assert sum(stats.accepted) == sum(stats.drafted_by.values())
    assert all(a <= s for a, s in zip(stats.accepted, stats.submitted, strict=True))
    assert stats.submitted[1:] == [] or all(
        later <= earlier for earlier, later in zip(stats.accepted, stats.submitted[1:], strict=False)
    )


def test_same_text() -> None:
    """The law of the package. Certificates of near ties are counted and must be rare."""
    certificates: list[Case] = []
    examples = accepted = 0

    @settings(
        max_examples=EXAMPLES,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
    )
    @given(cases())
    def law(case: Case) -> None:
        nonlocal examples, accepted
        expected, logits = plain_tokens(case)
        stats, cache = DecodeStats(), case.model().make_cache()
        items = run(case, expected, cache, stats)
        tokens = [item.token for item in items]
        examples += 1
        accepted += sum(item.from_draft for item in items)
        assert {layer.offset for layer in cache} == {len(case.prompt) + len(tokens)}
        check_stats(case, stats, len(tokens))
        assert sum(item.from_draft for item in items) == sum(stats.accepted)
        if tokens != expected:
            parted = next(
                i for i, pair in enumerate(zip(tokens, expected, strict=True)) if len(set(pair)) > 1
            )
            assert certified(case, logits, items, parted), (parted, tokens, expected)
            certificates.append(case)

    law()
    print(f"{examples} examples, {accepted} drafts accepted, {len(certificates)} near ties")
    assert accepted > 2 * examples, "the drafters must be accepted often, or nothing is tested"
    assert len(certificates) <= examples // 50, certificates


@pytest.mark.parametrize("layout", ["linear", "quadratic"])
def test_knowing_drafter_saves_passes(layout: str) -> None:
    """With a drafter that is always right, only the first step commits a single token."""
    case = Case("llama", (3, 1, 4), 21, layout, 4, False, 1.0, 2048, None, 0, SamplingConfig())
    expected, _ = plain_tokens(case)
    stats = DecodeStats()
    assert [item.token for item in run(case, expected, case.model().make_cache(), stats)] == expected
    assert stats.steps == 5 and stats.histogram == {1: 1, 5: 4}


@pytest.mark.parametrize("layout", ["plain", "linear", "quadratic"])
@pytest.mark.parametrize("stop_after", [1, 2, 5, 9])
def test_closing_early_leaves_mlx_lm_s_cache(layout: str, stop_after: int) -> None:
    """After closing inside a block, mlx-lm goes on from the cache as from its own, quantised or not."""
    for kv_bits, kv_start in [(None, 0), (8, 0), (8, 7), (8, 9), (8, 11), (4, 5000)]:
        case = Case("llama", (3, 1, 4), 30, layout, 4, False, 0.9, 2048, kv_bits, kv_start, SamplingConfig())
        model, plain, expected = case.model(), case.untouched(), plain_tokens(case)[0]
        options = case.cache_options()
        own, theirs = model.make_cache(), make_prompt_cache(plain)
        with drafting(KnowingDrafter(expected, 3, 1.0, 0)):
            steps = mtp_generate_step(
                list(case.prompt),
                model,
                policy=FixedPolicy(layout, 4),  # type: ignore[arg-type]
                prompt_cache=own,
                **options,
            )
            told = [next(steps).token for _ in range(stop_after)]
            steps.close()
        reference = generate_step(mx.array(case.prompt), plain, prompt_cache=theirs, **options)
        assert [next(reference)[0] for _ in range(stop_after)] == told
        reference.close()
        assert [type(layer) for layer in own] == [type(layer) for layer in theirs], (kv_bits, kv_start)
        assert [layer.offset for layer in own] == [layer.offset for layer in theirs]
        more = {"max_tokens": 8, **options}
        with drafting(KnowingDrafter([0] * 40, own[0].offset, 0.0, 0)):
            second = mtp_generate_step(
                [7, 8],
                model,
                policy=FixedPolicy(layout, 4),  # type: ignore[arg-type]
                prompt_cache=own,
                **more,
            )
            ours = [item.token for item in second]
        assert ours == [t for t, _ in generate_step(mx.array([7, 8]), plain, prompt_cache=theirs, **more)]


def test_the_policy_is_told_how_many_tokens_are_cached() -> None:
    """All of the prompt but its last token, and what the cache held before."""
    model, policy = attached("llama"), PlainWatching()
    cache = model.make_cache()
    for prompt in ([3, 1, 4], [1, 5]):
        list(mtp_generate_step(prompt, model, max_tokens=4, policy=policy, prompt_cache=cache))
    assert policy.contexts == [2, 3 + 4 + 1]


@pytest.mark.parametrize("layout", ["plain", "quadratic"])
@pytest.mark.parametrize("broken_pass", [0, 1, 2, 4])
@pytest.mark.parametrize("layer", [0, 1])
def test_interrupt_inside_a_pass_leaves_a_usable_cache(layout: str, broken_pass: int, layer: int) -> None:
    """Ctrl-C between two layers: every layer of the cache keeps the same whole beginning of the text."""
    model = attached("llama")
    prompt = [3, 1, 4, 1, 5]
    cache, passes = model.make_cache(), 0
    inner = model.model.model.layers[layer].self_attn
    original = type(inner).__call__

    def interrupted(self: Any, *args: Any, **kwargs: Any) -> Any:
        nonlocal passes
        result = original(self, *args, **kwargs)  # the cache has been written by now
        if self is inner:
            passes += 1
            if passes == broken_pass + 1:
                raise KeyboardInterrupt
        return result

    told: list[int] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(inner), "__call__", interrupted)
        steps = mtp_generate_step(
            prompt,
            model,
            policy=FixedPolicy(layout, 3),  # type: ignore[arg-type]
            prompt_cache=cache,
            prefill_step_size=2,
        )
        with pytest.raises(KeyboardInterrupt):
            for item in steps:
                told.append(item.token)
    offsets = {item.offset for item in cache}
    assert len(offsets) == 1 and 0 <= (kept := offsets.pop()) <= len(prompt) + len(told)
    text = prompt + told + [9, 2]
    rest = [item.token for item in mtp_generate_step(text[kept:], model, prompt_cache=cache, max_tokens=6)]
    assert rest == [token for token, _ in generate_step(mx.array(text), untouched("llama"), max_tokens=6)]


@pytest.mark.parametrize("layout", ["plain", "linear", "quadratic"])
def test_settings_that_ask_for_little(layout: str) -> None:
    model = attached("llama")

    def tokens(prompt: Any, **options: Any) -> list[int]:
        policy = FixedPolicy(layout, 2)  # type: ignore[arg-type]
        return [item.token for item in mtp_generate_step(prompt, model, policy=policy, **options)]

    assert tokens([5, 6], max_tokens=0) == []
    for count in (1, 2, 7):
        assert len(tokens([5, 6], max_tokens=count)) == count
    same = [
        tokens(p, max_tokens=5)
        for p in ([5, 6], (5, 6), mx.array([5, 6]), np.array([5, 6]), np.int64([5, 6]))
    ]
    assert all(found == same[0] for found in same)


def test_prefill_reports_progress() -> None:
    calls: list[tuple[int, int]] = []
    steps = mtp_generate_step(
        [1, 2, 3, 4, 5],
        attached("llama"),
        prefill_step_size=3,
        prompt_progress_callback=lambda done, total: calls.append((done, total)),
    )
    next(steps)
    steps.close()
    assert calls == [(3, 5), (4, 5), (5, 5)]


def test_a_slow_chunk_reports_between_its_layers_and_stops_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C waits for an evaluation, so a chunk must be more than one."""
    monkeypatch.setattr("mtp_mlx.decode.session.PROGRESS_SECONDS", 0.0)
    model, calls = attached("llama"), []
    prompt = [1, 2, 3, 4, 5, 6, 7, 8, 9]
    steps = mtp_generate_step(prompt, model, prompt_progress_callback=lambda *call: calls.append(call))
    next(steps)
    steps.close()
    assert len(calls) > 2 and calls == sorted(calls) and all(total == 9 for _, total in calls)
    assert 0 < calls[0][0] < 8  # inside the only chunk

    def interrupt(done: int, total: int) -> None:
        raise KeyboardInterrupt

    cache = model.make_cache()
    with pytest.raises(KeyboardInterrupt):
        next(mtp_generate_step(prompt, model, prompt_cache=cache, prompt_progress_callback=interrupt))
    assert cache[0].offset == 0


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ([], "empty"),
        ([0, VOCABULARY], "outside the vocabulary"),
        ([-1], "outside the vocabulary"),
        ([[1, 2]], "one sequence"),
        (np.array([[1, 2]]), "one sequence"),
        (mx.array([1.5]), "one sequence"),
        (mx.array(3), "one sequence"),
        (["a"], "one sequence"),
    ],
)
def test_bad_prompts(prompt: Any, message: str) -> None:
    with pytest.raises(MTPError, match=message):
        next(mtp_generate_step(prompt, attached("llama")))


def test_token_ids_are_plain_ints() -> None:
    assert token_ids(np.array([1, 2], dtype=np.uint8)) == [1, 2]
    assert all(type(token) is int for token in token_ids([np.int32(3), 4]))
