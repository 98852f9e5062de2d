"""Runs a case: the texts as they must be, and as several tokens per pass write them.

At temperature 0 they must be mlx-lm's own, on a model that was never attached to; above it, those of our plain loop
with the same seed, on a model without a drafter.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import mlx.core as mx
import mlx_lm
from mlx_lm.sample_utils import make_logits_processors

from mtp_mlx.api import stream_generate
from mtp_mlx.decode.emission import Emission
from mtp_mlx.decode.pick import SamplingConfig
from mtp_mlx.decode.stats import DecodeStats
from mtp_mlx.model.attach import AttachedModel
from tests.tiny import tiny_tokenizer
from text_search import models
from text_search.case import Case, Text
from text_search.drafting import knowing


@dataclass
class Written:
    """One text.

    Attributes:
        tokens: ids.
        text: what they say, up to a stop string.
        reason: "stop", "length", or "" if it was closed before its end.
        logits: [V] raw logits of every token, lazy.
        before: tokens of the turns before it.
    """

    tokens: list[int] = field(default_factory=list)
    text: str = ""
    reason: str = ""
    logits: list[mx.array] = field(default_factory=list)
    before: list[list[int]] = field(default_factory=list)


@lru_cache
def tokenizer() -> Any:
    """The tokenizer of all tiny models."""
    return tiny_tokenizer()


def expected(case: Case) -> list[Written]:
    """The texts as they must be."""
    together = case.way == "turns"
    caches: list[Any] = []
    found = []
    for text in case.texts:
        if not caches or not together:
            caches = models.new_cache(case, models.attached(case, "none"))
        written = _reference(case, text, caches)
        written.before = [earlier.tokens for earlier in found]
        found.append(written)
    return found


def _reference(case: Case, text: Text, cache: list[Any]) -> Written:
    if case.sampling.temperature == 0:
        return _mlx_lm(case, text, cache)
    return plain(case, text, cache)


def plain(case: Case, text: Text, cache: list[Any]) -> Written:
    """What our plain loop writes, on the model without a drafter."""
    model = models.attached(case, "none")
    steps = stream_generate(
        model, tokenizer(), list(text.prompt), text.max_tokens, sampling=case.picked_by, layout="plain",
        prompt_cache=cache, **cache_options(case),
    )  # fmt: skip
    return _cut(steps, case.stop, text.taken, lambda response: response.logits)


def _mlx_lm(case: Case, text: Text, cache: list[Any]) -> Written:
    seen: list[mx.array] = []

    def remember(_: mx.array, logits: mx.array) -> mx.array:
        seen.append(logits[0])
        return logits

    steps = mlx_lm.stream_generate(
        models.bare_of(case), tokenizer(), list(text.prompt), text.max_tokens, prompt_cache=cache,
        logits_processors=[remember, *_penalties(case.picked_by)], **cache_options(case),
    )  # fmt: skip
    written = _cut(steps, case.stop, text.taken, lambda _: None)
    written.logits = seen[: len(written.tokens)]  # one more was running ahead
    return written


def _penalties(sampling: SamplingConfig) -> list[Any]:
    repeats = sampling.penalises_repetition
    return make_logits_processors(
        logit_bias=dict(sampling.logit_bias),
        repetition_penalty=sampling.repetition_penalty if repeats else None,
        repetition_context_size=sampling.repetition_context_size,
        presence_penalty=sampling.presence_penalty or None,
        presence_context_size=sampling.presence_context_size,
        frequency_penalty=sampling.frequency_penalty or None,
        frequency_context_size=sampling.frequency_context_size,
    )


def cache_options(case: Case) -> dict[str, Any]:
    """The options of the cache, by the names of both packages."""
    return {
        "prefill_step_size": case.prefill_step_size,
        "kv_bits": case.kv_bits or None,
        "kv_group_size": models.GROUP,
        "quantized_kv_start": case.quantized_kv_start,
    }


def arguments(case: Case) -> tuple[Any, int | None]:
    """`layout` and `drafts` of a case, as in `stream_generate`; a mixed layout is planned as a linear one."""
    layout = "linear" if case.layout == "mixed" else case.layout
    return layout, case.drafts if case.drafter != "none" or layout == "linear" else None


def _cut(responses: Any, stop: Sequence[str], taken: int, logits_of: Any) -> Written:
    """The text of a stream of responses that knows no stop strings, up to the first of them."""
    written = Written()
    with closing(responses):
        for response in responses:
            written.tokens.append(int(response.token))
            written.logits.append(logits_of(response))
            written.text += response.text
            at = min((place for one in stop if (place := written.text.find(one)) >= 0), default=None)
            if at is not None:
                written.text, written.reason = written.text[:at], "stop"
                break
            if response.finish_reason is not None:
                written.reason = response.finish_reason
                break
            if len(written.tokens) == taken:
                break
    return written


def found(case: Case, truths: Iterable[Written]) -> tuple[list[Written], DecodeStats]:
    """The texts as the drafter, layout and cache of the case write them, and what happened."""
    model, stats = models.attached(case), DecodeStats()
    cache: list[Any] = []
    texts: list[Written] = []
    start = 0
    for text, truth in zip(case.texts, truths):
        if not cache or case.way != "turns":
            cache, start = models.new_cache(case, model), 0
        start += len(text.prompt)
        with knowing(case, model, truth.tokens, len(text.prompt), start):
            texts.append(_drafted(case, text, model, cache, stats))
        start += len(texts[-1].tokens)
        if texts[-1].tokens != truth.tokens:
            break  # the next turn goes on from another text
    return texts, stats


def _drafted(case: Case, text: Text, model: AttachedModel, cache: list[Any], stats: DecodeStats) -> Written:
    layout, drafts = arguments(case)
    steps = stream_generate(
        model, tokenizer(), list(text.prompt), text.max_tokens,
        sampling=case.picked_by,
        layout=layout,
        drafts=drafts,
        rows=case.rows if layout == "tree" else None,
        lookup=case.lookup != "none",
        emission=Emission(tau=case.tau or None),
        stop=case.stop,
        stats=stats,
        prompt_cache=cache,
        **cache_options(case),
    )  # fmt: skip
    written = Written()
    with closing(steps):
        for response in steps:
            written.tokens.append(response.token)
            written.logits.append(response.logits)
            written.text += response.text
            written.reason = response.finish_reason or ""
            if len(written.tokens) == text.taken:
                break
    return written
