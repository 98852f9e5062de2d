"""Corrects the measured cost curve by what steps really take.

The curve is measured within a few seconds, each size a few times at most, perhaps while the machine does something
else: sizes that are off by a fifth are common, and the planner would avoid some rows for good, or take to others. So
its error is modelled as a sum of unknown parts, in logarithms, and every step tells of the sum of its own:

    pace        of the machine, which all steps share
    plain       steps, which overlap with the host
    rows        of the pass, of which near numbers err alike
    slot rows   the same for slots, and slots as a whole
    chain       of so many drafts; counts less in a step of many rows, of which it is a smaller share

So a step of three rows tells something of four, and one with a chain tells of those without. The parts are Gaussian,
around zero at first, and walk slowly: this is an extended Kalman filter (Kalman 1960, "A new approach to linear
filtering and prediction problems"). How far single steps scatter is learnt beside it. A step's surprise is taken as
it is, not its logarithm: what counts is the time of all steps together, and plain steps that overlap take turns at
waiting for two passes and for none.
"""

from __future__ import annotations

from functools import lru_cache
from math import exp, log, sqrt

import numpy as np

from mtp_mlx.decode.layout import Layout
from mtp_mlx.planning.cost import StepCost

ROWS = (1, 2, 3, 4, 5, 6, 8, 12, 16, 24)  # between them, what is learnt of rows follows the logarithm
CHAINS = 8  # chains of so many drafts or more are learnt together
# Standard deviations of the parts at first, in logarithms:
PACE, PLAIN, SLOTS = 0.3, 0.2, 0.1
# Each number of rows alone, and near ones together, so far apart in log rows:
EACH, NEAR, REACH = 0.12, 0.12, 0.7
CHAIN_EACH, CHAIN_NEAR = 0.15, 0.1  # each length of a chain alone, and all together
PACE_WALK = 0.005  # that the pace changes by in a step
WALK = 0.0005  # variance that the other parts gain in a step, as a share of that at first
SCATTER = {True: 0.5, False: 0.15}  # of single steps at first, of plain ones (which take turns) and of others
SCATTER_WEIGHT, SCATTER_KEPT = 5.0, 0.98  # the weight of that, in steps, and what a step leaves of it
LEAST_SCATTER = 0.05
# Times what was expected: steps during which something else used the machine count no more.
LARGEST_SURPRISE = 2.0
UNLIKELY = 3.0  # standard deviations; a larger surprise counts as one of so many

_ROWS_AT, _CHAINS_AT = 2, 2 + len(ROWS)
_SLOTS_AT = _CHAINS_AT + CHAINS
_PARTS = _SLOTS_AT + 1 + len(ROWS)


class CostCorrection:
    """The curve of `follow`, with what steps have taught of its errors.

    Attributes:
        since_plain: steps since a plain one was observed.
    """

    def __init__(self) -> None:
        self.since_plain = 0
        self._curve: StepCost | None = None
        self._forget()

    def _forget(self) -> None:
        self._errors = np.zeros(_PARTS)
        self._variances = _first_variances().copy()
        # Of plain steps and of others: (weight, sum of squares).
        self._scatter = {plain: (SCATTER_WEIGHT, SCATTER_WEIGHT * size**2) for plain, size in SCATTER.items()}

    def follow(self, curve: StepCost) -> None:
        """Corrects this curve from now on. What was learnt of another one is forgotten."""
        if curve != self._curve:
            self._curve = curve
            self._forget()

    def seconds(self, layout: Layout, context: int) -> float:
        """Seconds that a step in `layout` with `context` cached tokens is expected to take."""
        said, parts = self._said(layout, context)
        return said * exp(float(parts @ self._errors))

    def observe(self, layout: Layout, context: int, seconds: float) -> None:
        """Learns that a step in `layout` with `context` cached tokens took `seconds`.

        Raises:
            ValueError: if `seconds` is not positive.
        """
        if not seconds > 0:
            raise ValueError(f"step times must be positive: {seconds} s")
        is_plain = layout == Layout.plain()
        self.since_plain = 0 if is_plain else self.since_plain + 1
        said, parts = self._said(layout, context)
        ratio = seconds / (said * exp(float(parts @ self._errors)))
        self._learn(parts, min(ratio, LARGEST_SURPRISE) - 1.0, is_plain)

    def _learn(self, parts: np.ndarray, surprise: float, is_plain: bool) -> None:
        """One step of the filter.

        Args:
            parts: [_PARTS] weights of the parts in this step.
            surprise: seconds that it took longer than expected, as a share of those expected.
            is_plain: whether it was a plain one; these scatter on their own.
        """
        weight, squares = self._scatter[is_plain]
        noise = max(squares / weight, LEAST_SCATTER**2)
        self._variances += _walk()
        spread = self._variances @ parts
        variance = float(parts @ spread) + noise
        most = UNLIKELY * sqrt(variance)
        surprise = min(max(surprise, -most), most)
        self._errors += spread * (surprise / variance)
        self._variances -= np.outer(spread, spread) / variance
        share = surprise**2 * noise / variance  # of the surprise, what is due to scatter
        self._scatter[is_plain] = SCATTER_KEPT * weight + 1.0, SCATTER_KEPT * squares + share

    def _said(self, layout: Layout, context: int) -> tuple[float, np.ndarray]:
        """Seconds of a step by the curve, and the weights [_PARTS] of the parts of its error."""
        assert self._curve is not None, "there is no curve to correct before `follow`"
        curve, said = self._curve, self._curve.seconds(layout, context)
        slot_rows = layout.slot_rows + layout.lead_rows(curve.lead)
        parts = _parts(layout == Layout.plain(), curve.rows_of(layout), slot_rows)
        if layout.chain:
            parts = parts.copy()
            parts[_CHAINS_AT + min(layout.chain, CHAINS) - 1] = curve.plain_seconds / said
        return said, parts


@lru_cache(maxsize=1 << 12)
def _parts(is_plain: bool, rows: int, slot_rows: int) -> np.ndarray:
    """[_PARTS] weights of the parts of a step's error without those of chains, by all rows and those of slots."""
    found = np.zeros(_PARTS)
    found[0] = 1.0
    if is_plain:
        found[1] = 1.0
        return found
    found[_ROWS_AT:_CHAINS_AT] = _between(rows)
    if slot_rows:
        found[_SLOTS_AT] = 1.0
        found[_SLOTS_AT + 1 :] = _between(slot_rows)
    return found


def _between(rows: int) -> np.ndarray:
    """[len(ROWS)] weights of the two of ROWS between which `rows` lies; they add up to 1."""
    place = np.interp(log(rows), np.log(ROWS), np.arange(len(ROWS)))
    return np.maximum(0.0, 1.0 - np.abs(np.arange(len(ROWS)) - place))


@lru_cache(maxsize=1)
def _first_variances() -> np.ndarray:
    """[_PARTS, _PARTS] covariance of the parts before any step."""
    found = np.zeros((_PARTS, _PARTS))
    apart = np.abs(np.subtract.outer(np.log(ROWS), np.log(ROWS)))
    of_rows = EACH**2 * np.eye(len(ROWS)) + NEAR**2 * np.exp(-apart / REACH)
    found[0, 0], found[1, 1], found[_SLOTS_AT, _SLOTS_AT] = PACE**2, PLAIN**2, SLOTS**2
    found[_ROWS_AT:_CHAINS_AT, _ROWS_AT:_CHAINS_AT] = of_rows
    found[_CHAINS_AT:_SLOTS_AT, _CHAINS_AT:_SLOTS_AT] = CHAIN_EACH**2 * np.eye(CHAINS) + CHAIN_NEAR**2
    found[_SLOTS_AT + 1 :, _SLOTS_AT + 1 :] = of_rows
    return found


@lru_cache(maxsize=1)
def _walk() -> np.ndarray:
    """[_PARTS, _PARTS] covariance that a step adds."""
    found = WALK * _first_variances()
    found[0, 0] = PACE_WALK**2
    return found
