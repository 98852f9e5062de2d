"""Acceptance of MTP heads by depth, on the base model's own greedy answers: the tables of arXiv 2603.23911.

AR at depth k is how often draft k is right if all drafts before it are; CAR is how often the first k drafts are all
right. The answers must be the base model's greedy ones, so that decoding would accept the same chains of drafts.
Every position of the answers counts once, whereas decoding skips positions whose drafts were accepted.

    mtp-mlx distill --prompts prompts.jsonl --out answers.jsonl --max-tokens 128
    python benchmarks/heads_acceptance.py --data answers.jsonl --heads heads:4 --heads heads:8

`FOLDER:N` makes N drafts, reusing the folder's heads in order (looped without training).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click
import numpy as np

from mtp_mlx.blas import prefer_openblas


def folder_and_drafts(value: str) -> tuple[Path, int | None]:
    """Split "FOLDER:N" into (folder, N); without a number, N is None: as many drafts as heads."""
    folder, separator, count = value.rpartition(":")
    return (Path(folder), int(count)) if separator and count.isdigit() else (Path(value), None)


def table_rows(row: dict[str, Any], most: int) -> list[str]:
    """Two lines of the table, with `most` columns for depths."""
    lines = []
    for rate, last in (("ar", ""), ("car", f"{row['tokens_per_step']:.2f}")):
        cells = [f"{value:.3f}" for value in row[rate]] + [""] * (most - row["drafts"])
        lines.append(f"| {row['heads']} | {rate.upper()} | " + " | ".join(cells) + f" | {last} |")
    return lines


@click.command()
@click.option("--model", default="smollm2-135m", show_default=True, help="Embedded model, folder or hub id")
@click.option("--data", type=click.Path(path_type=Path), required=True, help="Greedy answers of the model")
@click.option("--heads", "entries", multiple=True, required=True, help="Folder of heads, or FOLDER:DRAFTS")
@click.option("--limit", type=click.IntRange(1), help="The first N answers only")
@click.option(
    "--max-length", default=1024, show_default=True, help="Truncate rows at this length; drop longer prompts"
)
@click.option(
    "--hidden-cache",
    type=click.Path(path_type=Path),
    help="Folder to cache the base model's states in, in 16 bits: heads that read the same ones need one pass",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of a table")
def main(
    model: str,
    data: Path,
    entries: tuple[str, ...],
    limit: int | None,
    max_length: int,
    hidden_cache: Path | None,
    as_json: bool,
) -> None:
    """Print a table of AR and CAR by depth, with two rows per folder of heads."""
    prefer_openblas()
    from mtp_mlx import load
    from mtp_mlx.adapter_folder import read_header
    from mtp_mlx.drafters.heads.agreement import measure_heads
    from mtp_mlx.drafters.heads.draft_heads import DraftHeads
    from mtp_mlx.drafters.heads.folder import config_of
    from mtp_mlx.drafters.heads.trunk_states import CachedStates, ComputedStates
    from mtp_mlx.models import named_adapter
    from mtp_mlx.train.data import load_examples

    chosen = [folder_and_drafts(entry) for entry in entries]
    # Read all folders first, so that a bad one is refused right away.
    named = [(named_adapter(folder), drafts) for folder, drafts in chosen]
    most = max(drafts or config_of(folder, read_header(folder)).drafts for folder, drafts in named)
    if not as_json:
        click.echo(
            "| heads | rate | " + " | ".join(str(depth) for depth in range(1, most + 1)) + " | tok/step |"
        )
        click.echo("|---|---|" + "---|" * (most + 1))
    found = []
    for entry, (folder, drafts) in zip(entries, chosen, strict=True):
        attached, tokenizer = load(model, folder)
        examples, report = load_examples(data, tokenizer, max_length, vocab_size=attached.vocab_size)
        if not isinstance(attached.speculator, DraftHeads):
            raise click.UsageError(f"{folder} has no MTP heads")
        attached.speculator.check_drafts(drafts)
        depths, batches = drafts or attached.most_drafts, [[example] for example in examples[:limit]]
        states = CachedStates(attached, hidden_cache) if hidden_cache else ComputedStates(attached)
        result = measure_heads(attached, batches, depths, states)
        row = {
            "heads": entry,
            "drafts": depths,
            "ar": result.acceptance,
            "car": [float(value) for value in np.cumprod(result.acceptance)],
            "tokens_per_step": result.tokens_per_step,
            "positions": result.blocks,
        }
        found.append(row)
        if not as_json:
            click.echo("\n".join(table_rows(row, most)))
        attached.detach()
    if as_json:
        click.echo(json.dumps(found))
    else:
        fewest, largest = min(row["positions"] for row in found), max(row["positions"] for row in found)
        click.echo(
            f"\n{fewest} to {largest} positions (fewer with more drafts) of {len(examples[:limit])} rows of "
            f"{data.name}; {report.dropped} rows dropped, their prompts fill {max_length} tokens; "
            f"{report.truncated} truncated"
        )


if __name__ == "__main__":
    main()
