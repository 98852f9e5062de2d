"""The search: deals cases out to processes and collects what they find.

Imports no mlx by itself: a process must prefer OpenBLAS before it does.
"""

from __future__ import annotations

import itertools
import multiprocessing
import signal
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from typing import TYPE_CHECKING

from mtp_mlx.blas import blas_threads, prefer_openblas

if TYPE_CHECKING:
    from text_search.case import Case
    from text_search.verdict import Verdict


@dataclass(frozen=True)
class Outcome:
    """A case and what came of it.

    Attributes:
        number: of the case in the search.
        case, verdict: as drawn.
        smallest: the smallest case with the same finding and its verdict; None if there is none.
    """

    number: int
    case: Case
    verdict: Verdict
    smallest: tuple[Case, Verdict] | None = None


@dataclass
class Tally:
    """What a search has seen so far.

    Attributes:
        seed: of the search.
        kinds: {kind of verdict: cases}.
        seen: {"field value": cases} of what the cases were about.
        accepted, rejected, tokens: drafts and tokens in all.
        findings: outcomes that break the promise, by number.
        near_ties: outcomes that a certificate excused.
    """

    seed: int
    kinds: Counter[str] = field(default_factory=Counter)
    seen: Counter[str] = field(default_factory=Counter)
    accepted: int = 0
    rejected: int = 0
    tokens: int = 0
    findings: list[Outcome] = field(default_factory=list)
    near_ties: list[Outcome] = field(default_factory=list)

    @property
    def cases(self) -> int:
        """Cases so far."""
        return self.kinds.total()

    def add(self, outcome: Outcome) -> None:
        """Counts an outcome."""
        case, verdict = outcome.case, outcome.verdict
        self.kinds[verdict.kind] += 1
        for name in ("dtype", "bits", "drafter", "layout", "lookup", "kv_bits", "window", "exact", "way"):
            self.seen[f"{name} {getattr(case, name)}"] += 1
        self.accepted += verdict.accepted
        self.rejected += verdict.rejected
        self.tokens += verdict.tokens
        if verdict.is_finding:
            self.findings.append(outcome)
            self.findings.sort(key=lambda one: one.number)
        elif verdict.kind == "near tie":
            self.near_ties.append(outcome)


def outcomes(seed: int, numbers: Iterable[int]) -> Iterator[Outcome]:
    """Runs the cases with these numbers, one after another, in this process."""
    from text_search.drawing import draw
    from text_search.shrinking import smallest
    from text_search.verdict import judge

    with blas_threads(1):  # a tiny product is not worth two
        for number in numbers:
            case = draw(seed, number)
            verdict = judge(case)
            small = smallest(case, verdict, judge) if verdict.is_finding else None
            yield Outcome(number, case, verdict, small)


def shared_outcomes(seed: int, most: int | None, jobs: int) -> Iterator[Outcome]:
    """Runs cases 0, 1, 2, ... in `jobs` processes, at most `most` of them; as they come.

    Closing the generator ends the processes.
    """
    if jobs == 1:
        yield from outcomes(seed, itertools.count() if most is None else range(most))
        return
    workers = [_Worker(seed, job, jobs, most) for job in range(jobs)]
    try:
        while any(worker.running for worker in workers):
            for pipe in wait([worker.pipe for worker in workers if worker.running]):
                worker = next(one for one in workers if one.pipe is pipe)
                found = worker.receive()
                if found is not None:
                    yield found
    finally:
        for worker in workers:
            worker.end()


class _Worker:
    """One process: every `jobs`-th case from `job` on. If a case ends the process, another goes on with the next."""

    def __init__(self, seed: int, job: int, jobs: int, most: int | None) -> None:
        self._seed, self._jobs, self._most = seed, jobs, most
        self.running = True
        self._number = job  # of the case that runs
        self._start(job)

    def _start(self, first: int) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, there = context.Pipe(duplex=False)
        arguments = (there, self._seed, first, self._jobs, self._most)
        self._process = context.Process(target=work, args=arguments, daemon=True)
        self._process.start()
        there.close()

    def receive(self) -> Outcome | None:
        """What the process has to say: an outcome, or None if it is about to run the next case or has ended."""
        try:
            message = self.pipe.recv()
        except EOFError:
            self._process.join()
            code = self._process.exitcode
            if not code:
                self.running = False
                return None
            lost = self._number
            self._start(lost + self._jobs)
            return _lost(self._seed, lost, code)
        if isinstance(message, int):
            self._number = message
            return None
        assert isinstance(message, Outcome)
        return message

    def end(self) -> None:
        """Ends the process."""
        self._process.terminate()


def _lost(seed: int, number: int, code: int) -> Outcome:
    """The outcome of a case that ended its process; it is not made smaller."""
    from text_search.drawing import draw
    from text_search.verdict import CRASH, Verdict

    how = signal.Signals(-code).name if code < 0 else f"exit code {code}"
    case, verdict = draw(seed, number), Verdict(CRASH, f"the process ended with {how}")
    return Outcome(number, case, verdict, (case, verdict))


def work(pipe: Connection, seed: int, first: int, step: int, most: int | None) -> None:
    """Runs in a process: sends the number of every `step`-th case from `first` on, and then its outcome."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent
    prefer_openblas()
    numbers = itertools.count(first, step) if most is None else range(first, most, step)
    for outcome in outcomes(seed, _announced(numbers, pipe)):
        pipe.send(outcome)


def _announced(numbers: Iterable[int], pipe: Connection) -> Iterator[int]:
    for number in numbers:
        pipe.send(number)
        yield number
