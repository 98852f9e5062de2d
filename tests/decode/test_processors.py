"""Logits processors: the text is mlx-lm's with them, whatever drafts, and each row is given the text before it."""

from __future__ import annotations

import mlx.core as mx
import pytest
from mlx_lm.generate import generate_step

from mtp_mlx.api import generate
from mtp_mlx.decode.emission import Emission
from mtp_mlx.decode.lookup import LookupDrafter
from mtp_mlx.decode.loop import mtp_generate_step
from mtp_mlx.decode.pick import Picker, SamplingConfig
from mtp_mlx.decode.policy import FixedPolicy, LookupPolicy, Policy
from mtp_mlx.decode.session import CacheSettings, Session
from mtp_mlx.decode.stats import DecodeStats
from mtp_mlx.drafters.memory.draft import MemoryDrafter
from mtp_mlx.errors import MTPError
from mtp_mlx.model.attach import attach
from mtp_mlx.planning.grow import TreePolicy
from tests.decode.fakes import random_adapter
from tests.tiny import tiny_model

PROMPT = [3, 4, 5, 6, 3, 4, 5, 6, 3, 4]
N_TOKENS = 24


def no_sum_of_seven(tokens: mx.array, logits: mx.array) -> mx.array:
    """Forbids the ids that with the last three make a multiple of seven: another set behind every text."""
    before = mx.sum(tokens[-3:]) + tokens.size
    forbidden = (mx.arange(logits.shape[-1]) + before) % 7 == 0
    return mx.where(forbidden, -mx.inf, logits)


def lower_last(tokens: mx.array, logits: mx.array) -> mx.array:
    """Makes the last token half as likely as it was."""
    return mx.where(mx.arange(logits.shape[-1]) == tokens[-1], logits - 0.7, logits)


PROCESSORS = [no_sum_of_seven, lower_last]
WAYS: dict[str, Policy] = {
    "plain": FixedPolicy("plain", 0),
    "linear": FixedPolicy("linear", 3),
    "quadratic": FixedPolicy("quadratic", 2),
    "tree": TreePolicy(10, 2, [0.5], places_slots=True),
}


def texts(way: str, temperature: float, stats: DecodeStats | None = None) -> list[int]:
    base = tiny_model("llama", seed=3)
    model = attach(base, random_adapter(base))
    sampling = SamplingConfig(temperature=temperature, seed=4)
    found = mtp_generate_step(
        PROMPT,
        model,
        max_tokens=N_TOKENS,
        sampling=sampling,
        policy=WAYS[way],
        lookup=None if way == "plain" else MemoryDrafter(None, model.vocab_size, branching=way == "tree"),
        logits_processors=PROCESSORS,
        stats=stats,
    )
    return [item.token for item in found]


@pytest.mark.parametrize("way", WAYS)
def test_the_text_is_that_of_mlx_lm(way: str) -> None:
    model = tiny_model("llama", seed=3)
    expected = generate_step(mx.array(PROMPT), model, max_tokens=N_TOKENS, logits_processors=PROCESSORS)
    stats = DecodeStats()
    assert texts(way, 0.0, stats) == [int(token) for token, _ in expected]
    assert way == "plain" or sum(stats.submitted) > 10


@pytest.mark.parametrize("way", ["linear", "quadratic", "tree"])
def test_sampled_text_is_that_of_plain_decoding(way: str) -> None:
    assert texts(way, 0.8) == texts("plain", 0.8)


def test_a_row_of_a_tree_is_given_the_text_of_its_own_path() -> None:
    seen: list[list[int]] = []

    def noting(tokens: mx.array, logits: mx.array) -> mx.array:
        seen.append(tokens.tolist())
        return logits

    model = attach(tiny_model("llama", seed=3))
    cache, settings = model.make_cache(), CacheSettings()
    session = Session(model, Picker(), PROMPT, cache, settings, processors=[noting])
    logits = mx.zeros((4, model.vocab_size))
    session.processed(logits, [7, 8, 9], (-1, -1, 1))
    assert seen == [PROMPT, [*PROMPT, 7], [*PROMPT, 8], [*PROMPT, 8, 9]]
    seen.clear()
    session.processed(logits, [7, 8, 9])
    assert seen == [PROMPT, [*PROMPT, 7], [*PROMPT, 7, 8], [*PROMPT, 7, 8, 9]]


def test_accepted_drafts_stay_accepted() -> None:
    """A processor that changes nothing leaves drafts as they are."""
    model = attach(tiny_model("llama", seed=3))
    counts = []
    for processors in (None, [lambda tokens, logits: logits]):
        stats = DecodeStats()
        steps = mtp_generate_step(
            PROMPT,
            model,
            max_tokens=40,
            policy=LookupPolicy(5),
            lookup=LookupDrafter(3, 1),
            logits_processors=processors,
            stats=stats,
        )
        counts.append(([item.token for item in steps], stats.accepted, stats.steps))
    assert counts[0] == counts[1]


def test_what_does_not_fit_is_refused() -> None:
    base = tiny_model("llama", seed=3)
    model = attach(base, random_adapter(base))
    with pytest.raises(MTPError, match=r"`logits_processors\[0\]` must return logits of shape \(1, "):
        list(mtp_generate_step(PROMPT, model, logits_processors=[lambda tokens, logits: logits[0]]))
    with pytest.raises(MTPError, match="need verified drafts"):
        list(
            mtp_generate_step(
                PROMPT,
                model,
                policy=FixedPolicy("linear", 2),
                emission=Emission("static", None),
                logits_processors=PROCESSORS,
            )
        )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"sampler": lambda logprobs: mx.argmax(logprobs, axis=-1)}, "`sampling=SamplingConfig"),
        ({"temp": 0.7}, "unknown argument `temp`: did you mean `sampling`"),
        ({"prompt_cach": []}, "unknown argument `prompt_cach`: did you mean `prompt_cache`"),
        ({"xyzzy": 1}, "unknown argument `xyzzy`$"),
    ],
)
def test_arguments_of_mlx_lm_that_are_others_here(arguments: dict, message: str) -> None:
    with pytest.raises(MTPError, match=message):
        generate(attach(tiny_model("llama", seed=3)), None, PROMPT, **arguments)
