"""Makes the chances of submitted drafts true.

Of the drafts that a planner submits, those of some chance may be right more or less often than that: it submits the
ones that look good to it, and texts change. So we learn for every drafter which log-odds a draft needs before its
chance is said to be .25, or another of CHANCES: higher ones as soon as such drafts turn out wrong too often. Between
them, the said log-odds follow linearly; beyond the last ones they keep their distance.

Chances may come to need their log-odds in another order than their own, say .45 more than .55, if drafts on both
sides are surer than they seem, or less so. Their order stays all the same (`_rising`), but nothing of what is learnt
is dropped, so that what was said too often of some chance is made up for later.

That only renames chances. How likely drafts are, compared with each other, is learnt from all drafts at hand
(`acceptance`, `agreement`).
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate

from mtp_mlx.planning.agreement import chance_of, log_odds

CHANCES = (0.03, 0.075, 0.15, 0.25, 0.35, 0.45, 0.55, 0.65, 0.75, 0.85, 0.925, 0.975)
KNOTS = tuple(log_odds(chance) for chance in CHANCES)
# At first, chances above .9 need so much more: of many estimates, the highest ones are too high.
SURE, SURE_NEEDS = 0.9, 0.15
START = tuple(knot + SURE_NEEDS * (chance > SURE) for knot, chance in zip(KNOTS, CHANCES, strict=True))
RATE = 0.1  # that a draft moves the log-odds needed by, times its surprise


class Recalibration:
    """The chances that are said of drafts, by drafter."""

    def __init__(self) -> None:
        self._needed: dict[str, list[float]] = {}  # [knots] log-odds
        self._rising: dict[str, list[float]] = {}  # the same in rising order

    def chance(self, source: str, odds: float) -> float:
        """That is said of a draft of `source` with these log-odds."""
        return chance_of(_along(self._rising.get(source, START), KNOTS, odds))

    def learn(self, source: str, chance: float, right: bool) -> None:
        """Learns whether a submitted draft, of which `chance` was said, was right."""
        needed = self._needed.setdefault(source, list(START))
        said = min(max(log_odds(chance), KNOTS[0]), KNOTS[-1])
        left, share = _between(KNOTS, said)
        for knot, weight in ((left, 1.0 - share), (left + 1, share)):
            needed[knot] -= RATE * weight * (right - chance)
        self._rising[source] = _rising(needed)


def _rising(needed: Sequence[float]) -> list[float]:
    """The same in rising order: half-way between the highest up to each one and the lowest from there on."""
    highest, lowest = accumulate(needed, max), [*accumulate(reversed(needed), min)][::-1]
    return [(high + low) / 2 for high, low in zip(highest, lowest, strict=True)]


def _along(start: Sequence[float], end: Sequence[float], value: float) -> float:
    """Where `value` lies between numbers of `end` if it lies there between those of `start`."""
    if value <= start[0]:
        return end[0] + value - start[0]
    if value >= start[-1]:
        return end[-1] + value - start[-1]
    left, share = _between(start, value)
    return end[left] + share * (end[left + 1] - end[left])


def _between(numbers: Sequence[float], value: float) -> tuple[int, float]:
    """(index of the last number up to `value`, share of the way from there to the next one)."""
    left = min(bisect_right(numbers, value) - 1, len(numbers) - 2)
    return left, (value - numbers[left]) / (numbers[left + 1] - numbers[left])
