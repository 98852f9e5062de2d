"""Makes a case that was found smaller, as long as it still shows the same kind of finding.

One change at a time, the drastic ones first: fewer texts, options at their defaults, simpler choices, fewer tokens.
Every change lowers a field, so it ends; it is bounded by a number of runs and not by time, so it is reproducible.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import fields, replace
from typing import Any

from mtp_mlx.decode.pick import SamplingConfig
from text_search.case import Case, Text, choices
from text_search.drawing import allowed
from text_search.verdict import Verdict

MOST_RUNS = 250

# From simple to less simple.
ORDERS: dict[str, tuple[Any, ...]] = {
    "dtype": choices("dtype"),
    "layout": choices("layout"),
    "drafter": choices("drafter"),
    "lookup": choices("lookup"),
    "acceptance": (None, 1.0, 0.9, 0.6),
}


def smallest(case: Case, verdict: Verdict, judge: Callable[[Case], Verdict]) -> tuple[Case, Verdict]:
    """The smallest case that was found, and its verdict.

    Args:
        case, verdict: what the search found.
        judge: runs a case.
    """
    runs = 0
    shrinking = True
    while shrinking and runs < MOST_RUNS:
        shrinking = False
        for smaller in _smaller(case):
            if not allowed(smaller):
                continue
            runs += 1
            again = judge(smaller)
            if again.is_like(verdict):
                case, verdict, shrinking = smaller, again, True
                break
            if runs >= MOST_RUNS:
                break
    return case, verdict


def _smaller(case: Case) -> Iterator[Case]:
    """Cases that are smaller by one change."""
    yield from _fewer_texts(case)
    default = Case()
    for one in fields(case):
        if one.name in ORDERS or one.name in ("texts", "way", "sampling"):
            continue
        if getattr(case, one.name) != getattr(default, one.name):
            yield replace(case, **{one.name: getattr(default, one.name)})
    for name, order in ORDERS.items():
        known = getattr(case, name)
        for value in order[: order.index(known)] if known in order else order:
            yield replace(case, **{name: value})
    yield from (replace(case, sampling=sampling) for sampling in _simpler_sampling(case.sampling))
    if case.drafts > 1:
        yield replace(case, drafts=1)
        yield replace(case, drafts=case.drafts - 1)
    for index, text in enumerate(case.texts):
        for smaller in _smaller_texts(text):
            yield replace(case, texts=(*case.texts[:index], smaller, *case.texts[index + 1 :]))


def _fewer_texts(case: Case) -> Iterator[Case]:
    if case.way != "alone":
        for text in case.texts:
            yield replace(case, way="alone", texts=(Text(text.prompt, text.max_tokens),))
    if len(case.texts) > 1:
        for index in range(len(case.texts)):
            yield replace(case, texts=case.texts[:index] + case.texts[index + 1 :])


def _simpler_sampling(sampling: SamplingConfig) -> Iterator[SamplingConfig]:
    default = SamplingConfig()
    if sampling != default:
        yield default
    for one in fields(sampling):
        value = getattr(default, one.name)
        if getattr(sampling, one.name) != value:
            yield replace(sampling, **{one.name: value})


def _smaller_texts(text: Text) -> Iterator[Text]:
    for name in ("taken", "joins", "alone_after"):
        if getattr(text, name):
            yield replace(text, **{name: 0})
    prompt, count = text.prompt, len(text.prompt)
    if count > 1:
        yield replace(text, prompt=prompt[count // 2 :])
        yield replace(text, prompt=prompt[: count // 2])
    if text.max_tokens > 1:
        yield replace(text, max_tokens=text.max_tokens // 2)
        yield replace(text, max_tokens=text.max_tokens - 1)
    if count > 1:
        for index in range(count):
            yield replace(text, prompt=prompt[:index] + prompt[index + 1 :])
