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
from typing import TYPE_CHECKING, Any

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
    context = multiprocessing.get_context("spawn")
    workers: dict[Connection, Any] = {}
    try:
        for job in range(jobs):
            here, there = context.Pipe(duplex=False)
            worker = context.Process(target=_work, args=(there, seed, job, jobs, most), daemon=True)
            worker.start()
            there.close()
            workers[here] = worker
        while workers:
            for pipe in wait(list(workers)):
                assert isinstance(pipe, Connection)
                try:
                    yield pipe.recv()
                except EOFError:
                    workers.pop(pipe).join()
    finally:
        for worker in workers.values():
            worker.terminate()


def _work(pipe: Connection, seed: int, job: int, jobs: int, most: int | None) -> None:
    """One process: every `jobs`-th case from `job` on."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent
    prefer_openblas()
    numbers = itertools.count(job, jobs) if most is None else range(job, most, jobs)
    for outcome in outcomes(seed, numbers):
        pipe.send(outcome)
