"""Train the methods of this package on the same data with the same budget, and measure each of them.

There are five contestants: independent slots, O-PTP, C-PTP, self-distilled mask tokens with gated LoRA, and a
single mask token trained with the online objective. Each is measured in the quadratic layout at temperatures 0 and
0.7: tokens per step, acceptance by depth, and whether the text equals that of plain decoding with the same noise.
For the last one tau is swept as well.

    python benchmarks/compare_methods.py --data answers.jsonl --out compare --steps 300 \\
        --prompts spec_bench.jsonl --limit 24 --questions gsm8k_test.jsonl --question-limit 40

Everything is saved in the folder --out: adapters with their checkpoints, `measured.jsonl`, `tau.jsonl`, and at the
end `table.md`, `results.json` and `tau.svg`. After a stop, the same command resumes. The code is in
`method_comparison/`.
"""

from __future__ import annotations

import sys
from typing import Any

import click
from rich.console import Console

from method_comparison.decoding import measure
from method_comparison.plan import Plan
from method_comparison.report import write
from method_comparison.settings import CompareSettings
from method_comparison.tau import sweep
from method_comparison.training import train
from mtp_mlx.blas import prefer_openblas
from mtp_mlx.config import from_yaml, options_for
from mtp_mlx.errors import MTPError


@click.command()
@options_for(CompareSettings)
def main(**options: Any) -> None:
    """Train and measure, then print the table."""
    settings = from_yaml(CompareSettings, None, options)
    console = Console(stderr=True)
    plan = Plan(settings)
    try:
        train(plan, console)
        measured = measure(plan, console)
        tau_rows = sweep(settings, console)
    except KeyboardInterrupt:
        console.print("Stopped: the same command resumes from here.")
        sys.exit(130)
    click.echo(write(plan, measured, tau_rows))


if __name__ == "__main__":
    prefer_openblas()
    try:
        main()
    except MTPError as error:
        click.echo(f"error: {error}", err=True)
        sys.exit(2)
