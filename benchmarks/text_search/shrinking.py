"""Makes a case that was found smaller, as long as it still shows the same kind of finding.

One change at a time: fewer and shorter texts first, which make every further run cheaper, then options at their
defaults and simpler choices. Every change lowers a field, so it ends; it is bounded by a number of runs and not by
time, so it is reproducible.
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


class _Shrinking:
    """The smallest case so far, and the runs that are left."""

    def __init__(self, case: Case, verdict: Verdict, judge: Callable[[Case], Verdict]) -> None:
        self.case, self.verdict = case, verdict
        self._judge, self._tried = judge, {case.to_json()}

    def again(self, smaller: Callable[[Case], Iterator[Case]]) -> bool:
        """Takes the first of the smaller cases that still shows the finding; whether there is one."""
        for case in smaller(self.case):
            key = case.to_json()
            if key in self._tried or not allowed(case):
                continue
            if len(self._tried) > MOST_RUNS:
                return False
            self._tried.add(key)
            verdict = self._judge(case)
            if verdict.is_like(self.verdict):
                self.case, self.verdict = case, verdict
                return True
        return False


def smallest(case: Case, verdict: Verdict, judge: Callable[[Case], Verdict]) -> tuple[Case, Verdict]:
    """The smallest case that was found, and its verdict.

    Args:
        case, verdict: what the search found.
        judge: runs a case.
    """
    shrinking = _Shrinking(case, verdict, judge)
    changed = True
    while changed:
        changed = False
        for change in (_fewer_texts, _shorter, _defaults, _simpler, _simpler_sampling, _without_a_token):
            while shrinking.again(change):
                changed = True
    return shrinking.case, shrinking.verdict


def _fewer_texts(case: Case) -> Iterator[Case]:
    if case.way != "alone":
        for text in case.texts:
            yield replace(case, way="alone", texts=(Text(text.prompt, text.max_tokens),))
    if len(case.texts) > 1:
        for index in range(len(case.texts)):
            yield replace(case, texts=case.texts[:index] + case.texts[index + 1 :])


def _shorter(case: Case) -> Iterator[Case]:
    """With half of a prompt, fewer tokens, and texts that begin and end together."""
    for index, text in enumerate(case.texts):
        half = len(text.prompt) // 2
        found = [replace(text, **{name: 0}) for name in ("taken", "joins", "alone_after")]
        if half:
            found += [replace(text, prompt=text.prompt[half:]), replace(text, prompt=text.prompt[:half])]
        if text.max_tokens > 1:
            found += [replace(text, max_tokens=text.max_tokens - less) for less in _steps(text.max_tokens)]
        yield from (_with(case, index, smaller) for smaller in found)


def _steps(count: int) -> list[int]:
    """How much less than `count` to try: half of it first."""
    return sorted({count // 2, count // 4 or 1, 1}, reverse=True)


def _without_a_token(case: Case) -> Iterator[Case]:
    for index, text in enumerate(case.texts):
        for at in range(len(text.prompt)):
            if len(text.prompt) > 1:
                yield _with(case, index, replace(text, prompt=text.prompt[:at] + text.prompt[at + 1 :]))


def _with(case: Case, index: int, text: Text) -> Case:
    return replace(case, texts=(*case.texts[:index], text, *case.texts[index + 1 :]))


def _defaults(case: Case) -> Iterator[Case]:
    """With one option at its default; fewer drafts."""
    default = Case()
    for one in fields(case):
        if one.name not in ORDERS and one.name not in ("texts", "way", "sampling", "drafts"):
            yield replace(case, **{one.name: getattr(default, one.name)})
    yield from (replace(case, drafts=count) for count in range(1, case.drafts))


def _simpler(case: Case) -> Iterator[Case]:
    for name, order in ORDERS.items():
        for value in order[: order.index(getattr(case, name))]:
            yield replace(case, **{name: value})


def _simpler_sampling(case: Case) -> Iterator[Case]:
    default = SamplingConfig()
    yield replace(case, sampling=default)
    for one in fields(default):
        sampling = replace(case.sampling, **{one.name: getattr(default, one.name)})
        yield replace(case, sampling=sampling)
