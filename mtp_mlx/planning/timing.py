"""Times the steps of a model for `StepCost`, in about the seconds that it is given, however slow a step is.

The sizes that matter most come first. Each is timed if its likely time is left; the others may be timed later, by
going on with what is known. The machine may be busier then, or less: a step of one row is timed again, and what is
known is brought to the new pace.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property, partial
from statistics import median

import mlx.core as mx

from mtp_mlx.decode.drafter import DraftSource, Verified, source_of
from mtp_mlx.decode.layout import Layout
from mtp_mlx.decode.loop import speculative_step
from mtp_mlx.decode.pick import Picker
from mtp_mlx.decode.session import CacheSettings, Session
from mtp_mlx.decode.step import shape_of
from mtp_mlx.distributed import Peers
from mtp_mlx.model.attach import AttachedModel
from mtp_mlx.planning.cost import UNMEASURED_DRAFT, StepCost, interpolate

REAL_ROWS = (1, 4, 16, 2, 8, 24, 3, 6, 12)  # in order of their worth
SLOT_ROWS = (4, 12, 1, 20, 2, 8)  # the same, without lead rows, which draft nothing
SHORT_CONTEXT = 1
LONG_CONTEXTS = (768, 384, 192)  # the longest is taken for which there is time; costs grow linearly with it
REPEATS = 3
ROOM = 20  # a size is timed again only if the budget has room for this many more of its runs
PLAIN_STEPS = 6  # that are timed with that room; two without

Progress = Callable[[int, int], None]


def measure(
    model: AttachedModel,
    seconds: float,
    known: StepCost | None = None,
    progress: Progress | None = None,
) -> StepCost:
    """Times steps of several sizes, at a short and a long context, as far as `seconds` go; a step of one row always.

    Args:
        model: the model with its drafter.
        seconds: that this may take.
        known: what has been measured before, which is gone on with.
        progress: called after each size with the number of sizes timed now and of those to time.
    """
    budget = _Budget(model.peers, seconds)
    timer = _Timer(model, budget, known)
    if known is not None:
        timer.keep_pace()
    sizes = list(timer.missing())
    for done, size in enumerate(sizes, start=1):
        if budget.affords(size.estimate()):
            size.run()
        if progress is not None:
            progress(done, len(sizes))
    return timer.cost()


def seconds_to_go_on(model: AttachedModel, known: StepCost) -> float | None:
    """Least seconds in which something that is not `known` can be measured; None if everything is."""
    sizes = _Timer(model, _Budget(model.peers, 0.0), known).missing()
    estimates = [size.estimate() for size in sizes]
    return min(estimates) + 2 * known.short[0] if estimates else None  # the prompt, and `keep_pace`


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


@dataclass(frozen=True)
class _Size:
    """Something to time: seconds that this will hardly exceed, and how to."""

    estimate: Callable[[], float]
    run: Callable[[], None]


class _Timer:
    """What is known of a model's steps, and how to time the rest."""

    def __init__(self, model: AttachedModel, budget: _Budget, known: StepCost | None) -> None:
        self._model, self._budget = model, budget
        source = source_of(model)
        self._slots = source if source is not None and source.places_slots else None
        self._chain = None if self._slots is not None else source
        self._long_context = LONG_CONTEXTS[0] if known is None else known.contexts[1]
        self._short: dict[int, float] = {}  # seconds by real rows
        self._growth: dict[int, float] = {}  # what a long context adds
        self._blocks: dict[
            int, tuple[int, float]
        ] = {}  # rows and seconds of blocks by slot rows, without drafting
        self._draft: float | None = None
        self._plain: tuple[float, ...] = ()
        if known is not None:
            self._take(known)

    def _take(self, known: StepCost) -> None:
        """Starts with what has been measured before."""
        self._short = dict(zip(known.rows, known.short, strict=True))
        if known.long:
            pairs = zip(known.rows, known.short, known.long, strict=True)
            self._growth = {rows: long - short for rows, short, long in pairs}
        surcharge = dict(zip(known.slot_rows, known.surcharge, strict=True))
        for layout in self._slot_layouts():
            rows, slot_rows = self._rows(layout)
            if slot_rows in surcharge:
                self._blocks[slot_rows] = rows, surcharge[slot_rows] + _interpolated(self._short, rows)
        self._draft, self._plain = known.draft, known.plain

    def keep_pace(self) -> None:
        """Times a step of one row again, and brings all that is known to the pace of now."""
        once = _Budget(self._model.peers, 0.0)
        pace = _seconds(self._session, Layout(0, (0,)), once) / self._short[1]
        for times in (self._short, self._growth):
            times.update({rows: pace * seconds for rows, seconds in times.items()})
        self._blocks = {count: (rows, pace * seconds) for count, (rows, seconds) in self._blocks.items()}
        self._draft = None if self._draft is None else pace * self._draft
        self._plain = tuple(pace * seconds for seconds in self._plain)

    def cost(self) -> StepCost:
        """What is known."""
        rows = tuple(sorted(self._short))
        slot_rows = tuple(sorted(self._blocks))
        blocks = (self._blocks[count] for count in slot_rows)
        long = [self._short[count] + _interpolated(self._growth, count) for count in rows if self._growth]
        return StepCost(
            rows=rows,
            contexts=(SHORT_CONTEXT, self._long_context),
            short=tuple(self._short[count] for count in rows),
            long=tuple(long),
            slot_rows=slot_rows,
            surcharge=tuple(seconds - _interpolated(self._short, count) for count, seconds in blocks),
            draft=self._draft,
            plain=self._plain,
            lead=self._model.lead,
        )

    def missing(self) -> Iterator[_Size]:
        """What is not known, in order of its worth."""
        yield from self._real_sizes(REAL_ROWS[:3])
        if not self._plain:
            yield _Size(lambda: 4 * self._short[1], self._time_plain)
        if self._slots is not None:
            yield from self._slot_sizes(self._slots)
        elif self._chain is not None and self._draft is None:
            yield _Size(partial(self._chain_estimate, self._chain), partial(self._time_chain, self._chain))
        if not self._growth:
            yield _Size(partial(self._long_estimate, LONG_CONTEXTS[-1]), self._time_long)
        yield from self._real_sizes(REAL_ROWS[3:])

    # --- real rows ------------------------------------------------------------------------------------------

    def _real_sizes(self, sizes: tuple[int, ...]) -> Iterator[_Size]:
        for rows in sizes:
            if rows not in self._short:
                yield _Size(partial(self._at_most, rows), partial(self._time_real, rows))

    def _at_most(self, rows: int) -> float:
        """Seconds that a step of so many rows will hardly exceed: rows beyond a measured size for its price each."""
        if not self._short:
            return -_ALWAYS
        measured = max((size for size in self._short if size <= rows), default=min(self._short))
        return self._short[measured] * max(1.0, rows / measured)

    def _time_real(self, rows: int) -> None:
        self._short[rows] = _seconds(self._session, Layout(rows - 1, (0,) * rows), self._budget)

    @cached_property
    def _session(self) -> Session:
        return _session(self._model, self._slots, SHORT_CONTEXT)

    def _time_plain(self) -> None:
        self._plain = (_plain_seconds(self._session, self._plain_steps(self._short[1])),)

    def _plain_steps(self, seconds: float) -> int:
        """How many plain steps to time if one takes so long."""
        return PLAIN_STEPS if self._budget.affords(ROOM * seconds) else 2

    def _long_estimate(self, context: int) -> float:
        most = max(self._short)
        return self._short[most] / most * context + 2 * self._short[1]

    def _time_long(self) -> None:
        """Times the sizes that were timed at the short context, as far as there is time."""
        fitting = [count for count in LONG_CONTEXTS if self._budget.affords(2 * self._long_estimate(count))]
        self._long_context = max(fitting, default=LONG_CONTEXTS[-1])
        session = _session(self._model, self._slots, self._long_context)
        for rows in REAL_ROWS:
            if rows in self._short and (not self._growth or self._budget.affords(self._at_most(rows))):
                took = _seconds(session, Layout(rows - 1, (0,) * rows), self._budget)
                self._growth[rows] = max(0.0, took - self._short[rows])
        if self._plain:
            likely = self._plain[0] + self._growth[1]
            affordable = self._budget.affords(4 * likely)
            longer = _plain_seconds(session, self._plain_steps(likely)) if affordable else likely
            self._plain = (self._plain[0], max(self._plain[0], longer))

    # --- slot rows ------------------------------------------------------------------------------------------

    def _slot_layouts(self) -> Iterator[Layout]:
        """Layouts with so many slot rows, in groups as large as possible."""
        if self._slots is None:
            return
        most = self._slots.drafts
        counts: tuple[int, ...] = SLOT_ROWS
        if self._model.why_linear:  # one group only
            counts = (most, *(count for count in SLOT_ROWS if count < most))
        for count in counts:
            groups = tuple(min(most, count - first) for first in range(0, count, most))
            yield Layout(len(groups) - 1, groups)

    def _rows(self, layout: Layout) -> tuple[int, int]:
        """All rows of a layout's block, and its slot rows, both with those that draft nothing."""
        lead = layout.lead_rows(self._model.lead)
        return layout.rows + lead, layout.slot_rows + lead

    def _slot_sizes(self, source: DraftSource) -> Iterator[_Size]:
        """Drafting from slots; then blocks with slots, of which the time of drafting is taken off."""
        if self._draft is None:
            yield _Size(
                lambda: 2 * (2 + source.drafts) * self._drafting(1), partial(self._time_drafting, source)
            )
        for layout in self._slot_layouts():
            if self._rows(layout)[1] not in self._blocks:
                yield _Size(partial(self._block_estimate, layout), partial(self._time_block, layout))

    def _drafting(self, count: int) -> float:
        """Seconds to draft so many tokens."""
        return count * (UNMEASURED_DRAFT * self._short[1] if self._draft is None else self._draft)

    def _time_drafting(self, source: DraftSource) -> None:
        one, all_ = (_propose_seconds(self._session, count, self._budget) for count in (1, 1 + source.drafts))
        self._draft = max(0.0, (all_ - one) / source.drafts)

    def _block_estimate(self, layout: Layout) -> float:
        if len(self._short) == 1:
            return _ALWAYS  # without the price of a real row, that of a slot row cannot be told from it
        return self._at_most(self._rows(layout)[0]) + self._drafting(max(layout.slots))

    def _time_block(self, layout: Layout) -> None:
        rows, slot_rows = self._rows(layout)
        took = _seconds(self._session, layout, self._budget)
        self._blocks[slot_rows] = rows, took - self._drafting(max(layout.slots))

    # --- chains ---------------------------------------------------------------------------------------------

    def _chain_estimate(self, source: DraftSource) -> float:
        return 2 * self._at_most(1 + source.drafts) + (1 + source.drafts) * self._short[1]

    def _time_chain(self, source: DraftSource) -> None:
        """Times drafting after a block that verifies as many drafts as the source makes."""
        session = _session(self._model, source, SHORT_CONTEXT)
        chain = source.drafts

        def seconds(layout: Layout) -> float:  # the text grows a little: a drafter cannot be rolled back
            return self._budget.timed(lambda: _ignore(speculative_step(session, layout, [1] * layout.drafts)))

        with_chain = seconds(Layout.chained(chain, chain))
        self._draft = max(0.0, with_chain - seconds(Layout.chained(chain, 0))) / chain


_ALWAYS = float("inf")  # seconds that no budget has; what takes so much less is always timed


def _session(model: AttachedModel, source: DraftSource | None, context: int) -> Session:
    """A greedy session that has run a prompt of `context` tokens and drafts with `source`."""
    picker = Picker()
    prompt = [token % model.vocab_size for token in range(3, context + 4)]
    opened = None if source is None else lambda start: source.open(model, picker, source.drafts, start)
    session = Session(model, picker, prompt, model.make_cache(), CacheSettings(), opened)
    session.prefill()
    return session


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


def _ignore(result: object) -> None:
    """Makes an action of a call whose result is of no interest."""


def _plain_seconds(session: Session, steps: int) -> float:
    """Seconds of a plain step that starts before the previous one is read; the text grows by a few tokens."""
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
