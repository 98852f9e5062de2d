"""The sweep of tau, for the contestant that is trained for unverified emission."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.console import Console

from method_comparison.contestants import LOSSY
from method_comparison.settings import CompareSettings


def sweep(settings: CompareSettings, console: Console) -> list[Any]:
    """Measure ConfAdapt at every tau; no rows if it does not take part.

    Raises:
        KeyboardInterrupt: if stopped; measurements so far are saved.
    """
    from mtp_mlx.cli import eval as evaluation

    contestant = next((one for one in settings.contestants if one.name == LOSSY), None)
    if contestant is None:
        return []
    own = evaluation.EvalSettings(
        model=settings.model,
        adapter=str(settings.folder(contestant)),
        questions=settings.questions,
        limit=settings.question_limit,
        tau=settings.tau,
        max_tokens=settings.max_tokens,
        out=settings.out / "tau.jsonl",
    )
    rows, whole = evaluation.sweep(own, False, console)
    if not whole:
        raise KeyboardInterrupt
    return rows


def tau_table(rows: Sequence[Any]) -> list[str]:
    """The table as lines of Markdown; empty without a sweep."""
    from mtp_mlx.measure.tau_sweep import TAU_COLUMNS

    if not rows:
        return []
    columns = (*TAU_COLUMNS, "lossless")
    lines = ["| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
    lines += ["| " + " | ".join((*row.cells(), str(row.lossless).lower())) + " |" for row in rows]
    return [*lines, ""]
