"""Sums up a trace: where the planner's expectations were wrong, and what that cost."""

from __future__ import annotations

from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from math import sqrt
from typing import Any

from mtp_mlx.planning.trace import TracedStep

EDGES = (0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95)  # of the bins of chances


@dataclass(frozen=True)
class Form:
    """All steps of one kind of layout.

    Attributes:
        form: see `TracedStep.form`.
        steps: how many.
        tokens, expected_tokens: that they committed, and that their chances promised. A plain step commits one.
        seconds, expected_seconds: that they took, and that the planner expected.
        plain_seconds: that their tokens would have taken in plain steps, as the planner estimates these.
    """

    form: str
    steps: int
    tokens: int
    expected_tokens: float
    seconds: float
    expected_seconds: float
    plain_seconds: float

    @property
    def lost(self) -> float:
        """Seconds that plain decoding would have saved; 0 if the steps paid."""
        return max(0.0, self.seconds - self.plain_seconds)


@dataclass(frozen=True)
class ChanceBin:
    """Drafts of one drafter with about the same chance, of those that verification reached.

    Attributes:
        drafter: who drafted.
        drafts: how many.
        predicted: their mean chance.
        observed: the share that was right.
        deviation: standard deviation of that share if every draft's chance was true.
    """

    drafter: str
    drafts: int
    predicted: float
    observed: float
    deviation: float


@dataclass(frozen=True)
class Explanation:
    """The sums of a trace.

    Attributes:
        forms: by kind of layout, the ones that took longest first.
        chances: by drafter and chance.
    """

    forms: list[Form]
    chances: list[ChanceBin]

    def to_json(self) -> dict[str, Any]:
        """As JSON values, for `--json`."""
        forms = [{**asdict(form), "lost_seconds": form.lost} for form in self.forms]
        return {"forms": forms, "chances": [asdict(one) for one in self.chances]}


def explain(steps: Iterable[TracedStep]) -> Explanation:
    """Sums up steps."""
    forms: dict[str, list[TracedStep]] = defaultdict(list)
    bins: dict[tuple[str, int], list[tuple[float, bool]]] = defaultdict(list)
    for step in steps:
        forms[step.form].append(step)
        for drafter, chance, right in step.reached():
            bins[drafter, bisect_right(EDGES, chance)].append((chance, right))
    return Explanation(
        sorted((_form(name, own) for name, own in forms.items()), key=lambda form: -form.seconds),
        [_bin(drafter, drafts) for (drafter, _), drafts in sorted(bins.items())],
    )


def _form(name: str, steps: list[TracedStep]) -> Form:
    return Form(
        form=name,
        steps=len(steps),
        tokens=sum(step.tokens for step in steps),
        expected_tokens=sum(step.expected_tokens for step in steps),
        seconds=sum(step.seconds for step in steps),
        expected_seconds=sum(step.expected_seconds for step in steps),
        plain_seconds=sum(step.tokens * step.plain_seconds for step in steps),
    )


def _bin(drafter: str, drafts: list[tuple[float, bool]]) -> ChanceBin:
    chances, right = zip(*drafts, strict=True)
    count, scatter = len(drafts), sum(chance * (1.0 - chance) for chance in chances)
    return ChanceBin(drafter, count, sum(chances) / count, sum(right) / count, sqrt(scatter) / count)
