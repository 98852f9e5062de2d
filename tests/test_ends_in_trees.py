"""Stop strings, end-of-text ids and lengths end a text in draft trees exactly where they end it without drafts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st

from mtp_mlx import GenerationResponse, SamplingConfig, stream_generate
from mtp_mlx.decode.stats import DecodeStats
from tests.decode.fakes import attached, drafting
from tests.decode.test_loop import samplings
from tests.decode.trees import KnowingTrees
from tests.tiny import VOCABULARY, tiny_tokenizer

EXAMPLES = 150
LONGEST = 24


@dataclass(frozen=True)
class Case:
    """One text, and what ends it.

    Attributes:
        prompt: token ids.
        sampling: how it is picked.
        rows: of a pass.
        acceptance: how often a draft that can be right is.
        pieces: (first character, length) of those pieces of the text that are stop strings.
        end: which of the tokens of the text ends it; None for none.
        max_tokens: most tokens.
    """

    prompt: tuple[int, ...]
    sampling: SamplingConfig
    rows: int
    acceptance: float
    pieces: tuple[tuple[int, int], ...]
    end: int | None
    max_tokens: int


@st.composite
def cases(draw: Any) -> Case:
    token = st.integers(0, VOCABULARY - 1)
    piece = st.tuples(st.integers(0, 40), st.integers(1, 8))
    return Case(
        prompt=tuple(draw(st.lists(token, min_size=1, max_size=12))),
        sampling=draw(samplings()),
        rows=draw(st.integers(2, 24)),
        acceptance=draw(st.sampled_from([0.6, 0.9, 1.0])),
        pieces=tuple(draw(st.lists(piece, max_size=3))),
        end=draw(st.sampled_from([None, None, 5, 11])),
        max_tokens=draw(st.one_of(st.just(LONGEST), st.just(LONGEST), st.integers(1, LONGEST))),
    )


def text_of(case: Case, ends: set[int], layout: Any, **options: Any) -> list[GenerationResponse]:
    tokenizer = tiny_tokenizer()
    tokenizer.eos_token_ids = ends
    model = attached("qwen3")
    return list(
        stream_generate(model, tokenizer, list(case.prompt), sampling=case.sampling, layout=layout, **options)
    )


def cut(responses: list[GenerationResponse], stops: list[str]) -> tuple[str, str | None, int]:
    """(text, why it ends, tokens) of responses that know no stop strings."""
    text = ""
    for count, response in enumerate(responses, start=1):
        text += response.text
        places = [text.find(stop) for stop in stops if stop in text]
        if places:
            return text[: min(places)], "stop", count
        if response.finish_reason is not None:
            return text, response.finish_reason, count
    raise AssertionError("no end")


@pytest.mark.parametrize("part", range(2))  # to run side by side
def test_same_end(part: int) -> None:
    """Whatever ends a text ends it there also in the middle of an accepted path."""
    inside = stopped = examples = 0

    @seed(part)
    @settings(
        max_examples=EXAMPLES,
        deadline=None,
        database=None,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
    )
    @given(cases())
    def law(case: Case) -> None:
        nonlocal inside, stopped, examples
        whole = text_of(case, set(), "plain", max_tokens=LONGEST)
        written = "".join(response.text for response in whole)
        truth = [response.token for response in whole]
        ends = set() if case.end is None else {truth[case.end]}
        stops = [written[start : start + size] for start, size in case.pieces if written[start:]]
        plain = text_of(case, ends, "plain", max_tokens=case.max_tokens)
        stats = DecodeStats()
        knowing: Any = KnowingTrees(truth, len(case.prompt), case.acceptance, case.sampling.seed % 1000)
        with drafting(knowing):
            given_options = {"max_tokens": case.max_tokens, "rows": case.rows, "stop": stops, "stats": stats}
            found = text_of(case, ends, "tree", **given_options)
        text = "".join(response.text for response in found)
        assert (text, found[-1].finish_reason, len(found)) == cut(plain, stops)
        examples += 1
        stopped += found[-1].finish_reason == "stop"
        inside += stats.tokens > len(found)

    law()
    print(f"{examples} examples, {stopped} ended before their length, {inside} of them inside a path")
    assert stopped > examples // 4 and inside > examples // 10, "texts must often end inside a path"
