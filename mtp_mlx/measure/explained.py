"""`mtp-mlx bench --explain`: records the planner's trace of a run, and shows where its expectations were wrong."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from rich.table import Table

from mtp_mlx.measure.rows import lane_table
from mtp_mlx.planning.explain import Explanation, explain
from mtp_mlx.planning.trace import VARIABLE, read_trace

FEWEST = 50  # drafts of a bin that are worth a line


@dataclass
class Recording:
    """A trace that is being written.

    Attributes:
        path: of the file.
        start: byte from which its steps count.
    """

    path: Path
    start: int = 0

    def restart(self) -> None:
        """Lets only steps from now on count."""
        self.start = self.path.stat().st_size if self.path.exists() else 0

    def explained(self) -> Explanation:
        """The sums of the steps that count; none if nothing was planned."""
        return explain(read_trace(self.path, self.start) if self.path.exists() else ())


@contextmanager
def recorded() -> Iterator[Recording]:
    """Traces to the file that the environment names, or else to one that is removed afterwards."""
    named = os.environ.get(VARIABLE)
    if named:
        recording = Recording(Path(named))
        recording.restart()
        yield recording
        return
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.jsonl"
        os.environ[VARIABLE] = str(path)
        try:
            yield Recording(path)
        finally:
            del os.environ[VARIABLE]


def tables(found: Explanation) -> list[Table]:
    """Steps by kind of layout, and drafts by drafter and chance."""
    forms = lane_table(
        "planned steps, expected and taken",
        ("steps of",),
        (
            "steps",
            "tok/step\nexpected",
            "tok/step",
            "ms/step\nexpected",
            "ms/step",
            "in plain\nsteps, ms",
            "lost, s",
        ),
    )
    for form in found.forms:
        numbers = (form.expected_tokens, form.tokens, form.expected_seconds, form.seconds, form.plain_seconds)
        means = [number / form.steps for number in numbers]
        times = [f"{1000 * mean:.1f}" for mean in means[2:]]
        forms.add_row(
            form.form, str(form.steps), f"{means[0]:.2f}", f"{means[1]:.2f}", *times, f"{form.lost:.2f}"
        )
    chances = lane_table(
        f"drafts by chance, where there are {FEWEST} or more",
        ("drafter",),
        ("drafts", "chance", "right", "off by", "± by luck"),
    )
    for one in found.chances:
        if one.drafts >= FEWEST:
            off = one.observed - one.predicted
            shares = (f"{one.predicted:.3f}", f"{one.observed:.3f}", f"{off:+.3f}", f"{one.deviation:.3f}")
            chances.add_row(one.drafter, str(one.drafts), *shares)
    return [forms, chances]
