"""Search random small cases for a text that is not the model's own, and make what is found smaller.

    python benchmarks/same_text_search.py --minutes 10
    python benchmarks/same_text_search.py --case '{"architecture":"qwen3","texts":[{"prompt":[5]}]}'

A case is a tiny random model (any architecture, dtype and weight quantisation), a drafter, a layout, a KV cache
(ordinary, quantised, rotating, reused from turn to turn), a sampling, stop strings, and one text, several turns or a
batch. At temperature 0 the text must be mlx-lm's, above it that of our plain loop with the same seed; with exact rows
the logits must be those of plain decoding, bit for bit. Case n of a seed is always the same. Needs a clone of the
repository: the models are those of the tests. Exit code 1 if something was found.
"""

from __future__ import annotations

import json
import shlex
import sys
import time
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from mtp_mlx.blas import prefer_openblas
from mtp_mlx.errors import MTPError
from text_search.search import Outcome, Tally, shared_outcomes

ROOT = Path(__file__).parent.parent
console = Console(stderr=True)


@click.command()
@click.option("--minutes", default=1.0, show_default=True, type=click.FloatRange(min=0, min_open=True))
@click.option("--cases", type=click.IntRange(min=1), help="Stop after this many cases instead")
@click.option("--seed", default=0, show_default=True, type=click.IntRange(min=0))
@click.option("--jobs", default=2, show_default=True, type=click.IntRange(min=1), help="Processes")
@click.option(
    "--findings", default=10, show_default=True, type=click.IntRange(min=1), help="Stop after so many"
)
@click.option("--case", "case_json", help="Run this case only: JSON, as printed for what was found")
@click.option("--json", "as_json", is_flag=True, help="Print JSON")
def main(
    minutes: float,
    cases: int | None,
    seed: int,
    jobs: int,
    findings: int,
    case_json: str | None,
    as_json: bool,
) -> None:
    """Search for texts that are not the model's own."""
    sys.path[:0] = [path for path in (str(ROOT),) if path not in sys.path]  # for the models of the tests
    prefer_openblas()
    if case_json is not None:
        sys.exit(_one_case(case_json, as_json))
    tally, started = Tally(seed), time.monotonic()
    interrupted = False
    try:
        _search(tally, minutes, cases, jobs, findings)
    except KeyboardInterrupt:
        interrupted = True
    seconds = time.monotonic() - started
    click.echo(json.dumps(_report(tally, seconds), indent=2) if as_json else _words(tally, seconds))
    sys.exit(130 if interrupted else 1 if tally.findings else 0)


def _search(tally: Tally, minutes: float, cases: int | None, jobs: int, findings: int) -> None:
    """Fills `tally` until the time, the cases or the number of findings is reached."""
    limit = 60 * minutes
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        bar = progress.add_task("starting", total=cases or limit)
        started = time.monotonic()
        with closing(shared_outcomes(tally.seed, cases, jobs)) as found:
            for outcome in found:
                tally.add(outcome)
                if outcome.smallest is not None:
                    console.print(_finding(outcome), markup=False, highlight=False, soft_wrap=True)
                passed = time.monotonic() - started
                progress.update(bar, completed=tally.cases if cases else passed, description=_line(tally))
                if (cases is None and passed >= limit) or len(tally.findings) >= findings:
                    break


def _line(tally: Tally) -> str:
    return f"{tally.cases} cases, {len(tally.near_ties)} near ties, {len(tally.findings)} found"


def command(case_json: str) -> str:
    """The command line that runs a case."""
    return f"python benchmarks/same_text_search.py --case {shlex.quote(case_json)}"


def _finding(outcome: Outcome) -> str:
    assert outcome.smallest is not None
    case, verdict = outcome.smallest
    return f"case {outcome.number}: {verdict.kind}: {verdict.detail}\n  {command(case.to_json())}"


def _words(tally: Tally, seconds: float) -> str:
    counts = ", ".join(f"{kind} {count}" for kind, count in sorted(tally.kinds.items()))
    seen = ", ".join(f"{name}: {count}" for name, count in sorted(tally.seen.items()))
    lines = [
        f"seed {tally.seed}: {tally.cases} cases in {seconds:.0f} s ({counts}); {tally.tokens} tokens, "
        f"{tally.accepted} drafts accepted, {tally.rejected} rejected",
        seen,
        *(f"near tie in case {one.number}: {one.verdict.detail}" for one in tally.near_ties),
        *(_finding(one) for one in tally.findings),
    ]
    return "\n".join(lines)


def _report(tally: Tally, seconds: float) -> dict[str, Any]:
    def described(one: Outcome) -> dict[str, Any]:
        case, verdict = one.smallest or (one.case, one.verdict)
        return {
            "number": one.number,
            "kind": verdict.kind,
            "detail": verdict.detail,
            "case": json.loads(case.to_json()),
            "drawn": json.loads(one.case.to_json()),
        }

    return {
        "seed": tally.seed,
        "cases": tally.cases,
        "seconds": round(seconds, 1),
        "kinds": dict(tally.kinds),
        "tokens": tally.tokens,
        "accepted": tally.accepted,
        "rejected": tally.rejected,
        "seen": dict(sorted(tally.seen.items())),
        "near_ties": [described(one) for one in tally.near_ties],
        "findings": [described(one) for one in tally.findings],
    }


def _one_case(case_json: str, as_json: bool) -> int:
    """Runs one case and prints its verdict; the exit code."""
    from text_search.case import from_json
    from text_search.drawing import check
    from text_search.verdict import judge

    try:
        case = from_json(case_json)
        check(case)
    except MTPError as error:
        click.echo(f"error: {error}", err=True)
        return 2
    verdict = judge(case)
    click.echo(json.dumps(asdict(verdict)) if as_json else f"{verdict.kind} {verdict.detail}".strip())
    return int(verdict.is_finding)


if __name__ == "__main__":
    main()
