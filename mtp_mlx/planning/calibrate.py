"""Measures `StepCost` for a model on this machine, once, and stores it in the user's cache.

The key holds device, mlx version, BLAS threads, model, dtype, drafter and kernels: if any of them changes, costs are
measured again. Measuring takes about `BUDGET` seconds, however slow a step is: the points that matter most come
first, and what there is no time for is left to `CostCorrection`, which learns from real steps. A few tokens are not
worth it.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import logging
import os
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import mlx.core as mx

from mtp_mlx.decode.drafter import DraftSource, Verified, source_of
from mtp_mlx.decode.layout import Layout
from mtp_mlx.decode.loop import speculative_step
from mtp_mlx.decode.pick import Picker
from mtp_mlx.decode.session import CacheSettings, Session
from mtp_mlx.decode.step import shape_of
from mtp_mlx.distributed import Peers
from mtp_mlx.files import cache_dir, keep_if_possible
from mtp_mlx.model.attach import AttachedModel
from mtp_mlx.model.fingerprint import base_fingerprint
from mtp_mlx.planning.cost import StepCost, interpolate, read_cost, save_cost

BUDGET = 3.0  # seconds
REAL_ROWS = (1, 4, 16, 2, 8, 24, 3, 6, 12)  # in order of their worth
SLOT_ROWS = (4, 12, 1, 20, 2, 8)  # the same, without lead rows, which draft nothing
SHORT_CONTEXT, LONG_CONTEXT = 1, 768
REPEATS = 3
ROOM = 8  # a size is timed again only if the budget has room for this many more of its runs
FEW_TOKENS = 16  # fewer are written sooner than measured
UNMEASURED_DRAFT = 0.25  # of a plain step: seconds to draft a token if there was no time to measure it

log = logging.getLogger("mtp_mlx")
_measured: dict[Path, StepCost] = {}  # by this process, which may be unable to keep them in files


def step_cost(model: AttachedModel, tell: Callable[[str], None] | None = None) -> StepCost:
    """The cached measurement for this model on this machine, or a new one, which takes about `BUDGET` seconds.

    Args:
        model: the model with its drafter.
        tell: called with a sentence before measuring; None to log it as a warning.
    """
    cost = _cached(model)
    if not all(model.peers.gather(cost is not None)):  # all processes must measure together
        (tell or log.warning)(
            f"measuring what a step costs on this machine (once per model, about {BUDGET:g} s)"
        )
        with model.peers.waiting():
            cost = measure(model)
        key = cost_key(model)
        path, measured = _cost_path(key), cost
        _measured[path] = measured
        keep_if_possible(lambda: save_cost(path, measured, key), "step costs")
    assert cost is not None
    return cost


def worth_measuring(model: AttachedModel, max_tokens: int | None) -> bool:
    """Whether costs are known, or the text may be long enough for measuring them; -1 and None are no limit."""
    if max_tokens is None or not 0 <= max_tokens <= FEW_TOKENS:
        return True
    return all(model.peers.gather(_cached(model) is not None))


def _cached(model: AttachedModel) -> StepCost | None:
    key = cost_key(model)
    path = _cost_path(key)
    return _measured.get(path) or read_cost(path, key)


def _cost_path(key: dict[str, str]) -> Path:
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]
    return cache_dir() / "costs" / f"{digest}.json"


def cost_key(model: AttachedModel) -> dict[str, str]:
    """Everything that a measurement depends on."""
    device = mx.default_device()
    name = platform.processor() or platform.machine()
    if device == mx.Device(mx.gpu):
        name = str(mx.device_info().get("device_name", name))
    source = source_of(model)
    shape = "none" if source is None else source.cost_key(model.draft_head.columns)
    embedded = model.embed(mx.zeros((1,), dtype=mx.int32))
    key = {
        "version": "2",
        "device": f"{device} {name} {os.cpu_count()}",
        "threads": os.environ.get("OPENBLAS_NUM_THREADS", "default"),
        "mlx": importlib.metadata.version("mlx"),
        "model": base_fingerprint(model.model),
        "dtype": f"{embedded.dtype} {'quantised' if _is_quantised(model) else 'dense'}",
        "adapter": shape if model.peers.alone else f"{shape}, part {model.peers.rank} of {model.peers.size}",
        "kernels": "none" if model.kernels is None else model.kernels.description,
        "exact": str(model.exact),
    }
    # Added only if there are lead rows: older measurements of such adapters lack the entry and counted too few rows.
    return {**key, "lead": str(model.lead)} if model.lead else key


def _is_quantised(model: AttachedModel) -> bool:
    return any("scales" in module for _, module in model.model.named_modules())


class _Budget:
    """The seconds that measuring may take. Process 0 decides, because all processes must run the same passes."""

    def __init__(self, peers: Peers, seconds: float) -> None:
        self._peers, self._ends = peers, time.perf_counter() + seconds

    def affords(self, seconds: float) -> bool:
        """Whether so many seconds are left."""
        return bool(self._peers.gather(time.perf_counter() + seconds <= self._ends)[0])

    def timed(self, run: Callable[[], None]) -> float:
        """Median seconds of `run` after a first run; those of the first run if there is no time for others."""
        times = [_once(run)]
        while len(times) <= REPEATS and self.affords(ROOM * times[-1]):
            times.append(_once(run))
        return median(times[1:] or times)


def _once(run: Callable[[], None]) -> float:
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


def measure(model: AttachedModel, seconds: float = BUDGET) -> StepCost:
    """Times steps of several sizes, at a short and a long context, as far as `seconds` go.

    At least a plain step is timed. Of what there is no time for, rows cost as much as the sizes measured suggest, and
    a long context costs nothing.
    """
    budget = _Budget(model.peers, seconds)
    source = source_of(model)
    slots = source if source is not None and source.places_slots else None
    prompt = [token % model.vocab_size for token in range(3, LONG_CONTEXT + 4)]
    session = _session(model, slots, prompt[: SHORT_CONTEXT + 1])
    short = _row_seconds(session, REAL_ROWS[:3], {}, budget)
    plain = _plain_seconds(session, short[1], budget)
    drafting = _Drafting(draft=UNMEASURED_DRAFT * plain)
    if slots is not None:
        drafting = _slot_seconds(session, slots, short, budget)
    elif source is not None:
        drafting = _Drafting(draft=_chain_seconds(model, source, prompt[: SHORT_CONTEXT + 1], short, budget))
    short = _row_seconds(session, REAL_ROWS[3:], short, budget)
    growth, plain_growth = {1: 0.0}, 0.0
    most = max(short)
    if budget.affords(short[most] / most * LONG_CONTEXT + 2 * short[1]):
        session = _session(model, slots, prompt)
        long = _row_seconds(session, tuple(short), {}, budget)
        growth = {rows: max(0.0, took - short[rows]) for rows, took in long.items()}
        plain_growth = max(0.0, _plain_seconds(session, long[1], budget) - plain)
    if most == 1:
        short[2] = 2 * short[1]  # nothing is known of the second row: not for free
    rows = tuple(sorted(short))
    return StepCost(
        rows=rows,
        contexts=(SHORT_CONTEXT, LONG_CONTEXT),
        short=tuple(short[count] for count in rows),
        long=tuple(short[count] + _interpolated(growth, count) for count in rows),
        slot_rows=drafting.slot_rows,
        surcharge=drafting.surcharge,
        draft=drafting.draft,
        plain=(plain, plain + plain_growth),
        lead=model.lead,
    )


def _row_seconds(
    session: Session, sizes: tuple[int, ...], known: dict[int, float], budget: _Budget
) -> dict[int, float]:
    """`known` seconds by real rows, and those of the sizes that the budget allows; one row in any case."""
    seconds = dict(known)
    for rows in sizes:
        if not seconds or budget.affords(_at_most(seconds, rows)):
            seconds[rows] = _seconds(session, Layout(rows - 1, (0,) * rows), budget)
    return seconds


def _at_most(seconds: dict[int, float], rows: int) -> float:
    """Seconds that a step of so many rows will hardly exceed: the rows beyond a measured size for its price each."""
    measured = max((size for size in seconds if size <= rows), default=min(seconds))
    return seconds[measured] * max(1.0, rows / measured)


@dataclass(frozen=True)
class _Drafting:
    """The cost of drafting besides the pass: the fields of the same names of `StepCost`."""

    draft: float = 0.0
    slot_rows: tuple[int, ...] = (1,)
    surcharge: tuple[float, ...] = (0.0,)


def _session(model: AttachedModel, source: DraftSource | None, prompt: list[int]) -> Session:
    """A greedy session that has run its prompt and drafts with `source`."""
    picker = Picker()
    opened = None if source is None else lambda start: source.open(model, picker, source.drafts, start)
    session = Session(model, picker, prompt, model.make_cache(), CacheSettings(), opened)
    session.prefill()
    return session


def _slot_seconds(
    session: Session, source: DraftSource, real: dict[int, float], budget: _Budget
) -> _Drafting:
    """Measures what slot rows cost beyond as many real rows, and what drafting one token from them costs.

    Args:
        session: with a drafter of `source`.
        source: the model's drafter, which uses slots.
        real: seconds of steps by real rows, at the same context.
        budget: what is not measured in time costs nothing beyond real rows.
    """
    model, most = session.attached, source.drafts
    draft = UNMEASURED_DRAFT * real[1]
    if budget.affords(2 * (2 + most) * draft):
        one, four = (_propose_seconds(session, count, budget) for count in (1, 1 + most))
        draft = max(0.0, (four - one) / most)
    surcharge = {}
    for count in SLOT_ROWS:
        groups = tuple(min(most, max(0, count - most * group)) for group in range(-(-count // most)))
        layout = Layout(len(groups) - 1, groups)
        lead_rows = layout.lead_rows(model.lead)
        drafting = draft * max(groups)
        if budget.affords(_at_most(real, layout.rows + lead_rows) + drafting):
            as_real = _interpolated(real, layout.rows + lead_rows)
            surcharge[layout.slot_rows + lead_rows] = _seconds(session, layout, budget) - as_real - drafting
    surcharge = surcharge or {1: 0.0}
    return _Drafting(draft, tuple(sorted(surcharge)), tuple(surcharge[rows] for rows in sorted(surcharge)))


def _interpolated(seconds: dict[int, float], rows: int) -> float:
    sizes = sorted(seconds)
    return interpolate(sizes, [seconds[size] for size in sizes], rows)


def _seconds(session: Session, layout: Layout, budget: _Budget) -> float:
    """Median seconds of a step; the session is restored afterwards."""
    length, cached = len(session.tokens), session.cached

    def step() -> None:
        speculative_step(session, layout, [1] * layout.drafts)
        session.trim(session.cached - cached)
        del session.tokens[length:]

    return budget.timed(step)


def _chain_seconds(
    model: AttachedModel, source: DraftSource, prompt: list[int], real: dict[int, float], budget: _Budget
) -> float:
    """Seconds to draft one token of a chain, after a block that verifies as many drafts as the source makes."""
    chain = source.drafts
    if not budget.affords(2 * _at_most(real, 1 + chain) + (1 + chain) * real[1]):
        return UNMEASURED_DRAFT * real[1]
    session = _session(model, source, prompt)

    def seconds(layout: Layout) -> float:  # the text grows a little: a drafter cannot be rolled back
        return budget.timed(lambda: _ignore(speculative_step(session, layout, [1] * layout.drafts)))

    with_chain = seconds(Layout.chained(chain, chain))
    return max(0.0, with_chain - seconds(Layout.chained(chain, 0))) / chain


def _ignore(result: object) -> None:
    """Makes an action of a call whose result is of no interest."""


def _plain_seconds(session: Session, seconds: float, budget: _Budget, steps: int = 6) -> float:
    """Seconds of a plain step that starts before the previous one is read; the text grows by a few tokens.

    Args:
        session: the session.
        seconds: of a step of one row, which is the answer if there is no time for several.
        budget: what may be spent.
        steps: number of steps to time.
    """
    if not budget.affords(ROOM * seconds):
        return seconds
    ahead = session.plain_pass(mx.array([1], dtype=mx.int32), 0)[0]
    mx.async_eval(ahead)
    times = []
    for _ in range(steps):
        following = session.plain_pass(ahead, 1)[0]
        mx.async_eval(following)
        mx.eval(ahead)
        times.append(time.perf_counter())
        ahead = following
    mx.eval(ahead)
    return median([after - before for before, after in zip(times, times[1:], strict=False)])


def _propose_seconds(session: Session, count: int, budget: _Budget) -> float:
    """Seconds to draft `count` tokens from hidden states that are already there."""
    model, drafter = session.attached, session.drafter
    assert drafter is not None
    layout = Layout(0, (count,))
    shape = shape_of(session, layout)
    zero = mx.array(0, dtype=mx.int32)
    hidden = mx.zeros((shape.rows, model.hidden_size), dtype=model.embed(zero).dtype)
    seen = Verified(
        layout=layout,
        shape=shape,
        hidden=hidden,
        head_input=mx.zeros((1, 1, model.head_input_size), dtype=hidden.dtype),
        logits=mx.zeros((1, 1)),
        picks=zero.reshape(1),
        accepted=zero,
        last=zero,
        position=zero,
        history=None,
        tokens=session.tokens,
    )

    def propose() -> None:
        fresh = drafter.propose(seen)
        mx.eval(fresh.ids, fresh.confidences)

    return budget.timed(propose)
