"""Acceptance of mask tokens by depth, on the base model's own greedy answers.

AR at depth k is how often draft k is right if all drafts before it are; CAR is how often the first k drafts are all
right. Tokens per step are those of the quadratic layout, which has drafts behind every possible acceptance: 1 + the
sum of CAR. The answers must be the base model's greedy ones, so that decoding would accept the same drafts. Every
position of the answers counts once (or every N-th), whereas decoding skips positions whose drafts were accepted.

    mtp-mlx distill --prompts prompts.jsonl --out answers.jsonl --max-tokens 64
    python benchmarks/slots_acceptance.py --data answers.jsonl --adapter one --adapter another

The base model runs once over each answer, for all adapters.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import numpy as np

from mtp_mlx.blas import prefer_openblas

if TYPE_CHECKING:
    import mlx.nn as nn

    from mtp_mlx.drafters.masks.weights import MaskAdapter
    from mtp_mlx.train.agreement import Agreement
    from mtp_mlx.train.data import Example

BLOCKS = 64  # whose hidden states and logits are in memory at once


def measure(
    model: nn.Module, adapters: list[MaskAdapter], examples: list[Example], every: int
) -> list[Agreement]:
    """Acceptance of each adapter, over every `every`-th position of the responses; shows progress on stderr."""
    from rich.console import Console
    from rich.progress import track

    from mtp_mlx.train.agreement import Tally

    tallies = [Tally(adapter.drafts) for adapter in adapters]
    for example in track(examples, "answers", console=Console(stderr=True)):
        count_right(model, adapters, tallies, example, every)
    return [tally.agreement() for tally in tallies]


def count_right(
    model: nn.Module, adapters: list[MaskAdapter], tallies: list[Any], example: Example, every: int
) -> None:
    """Counts the right drafts of each adapter behind the positions of one example."""
    import mlx.core as mx

    from mtp_mlx.drafters.slots.agreement import right_drafts
    from mtp_mlx.drafters.slots.layout import build_layout, candidate_anchors
    from mtp_mlx.drafters.slots.two_pass import prefix_pass
    from mtp_mlx.model.attach import attach

    prefix = None
    for adapter, tally in zip(adapters, tallies, strict=True):
        anchors = candidate_anchors(len(example), example.loss_start)[::every]
        anchors = anchors[anchors + 1 + adapter.drafts < len(example)]  # whole blocks with labels
        attached = attach(model, adapter)
        for start in range(0, len(anchors), BLOCKS):
            own = anchors[start : start + BLOCKS]
            layout = build_layout([example.tokens], [own], adapter.drafts, chunk_blocks=16)
            if prefix is None:
                prefix = prefix_pass(attached, layout)
                mx.eval(prefix.arrays())
            tally.add(right_drafts(attached, layout, prefix))
        attached.detach()


def table_rows(row: dict[str, Any], most: int) -> list[str]:
    """Two lines of the table, with `most` columns for depths."""
    lines = []
    for rate, last in (("ar", ""), ("car", f"{row['tokens_per_step']:.3f}")):
        cells = [f"{value:.3f}" for value in row[rate]] + [""] * (most - len(row[rate]))
        lines.append(f"| {row['adapter']} | {rate.upper()} | " + " | ".join(cells) + f" | {last} |")
    return lines


def load_adapters(model: nn.Module, entries: tuple[str, ...]) -> list[MaskAdapter]:
    """The adapters in these folders; a bad one is refused before anything is measured."""
    from mtp_mlx.adapter_folder import read_header
    from mtp_mlx.drafters.masks.folder import load as load_adapter
    from mtp_mlx.models import named_adapter

    folders = [named_adapter(entry) for entry in entries]
    return [load_adapter(folder, read_header(folder), model)[0] for folder in folders]


@click.command()
@click.option("--model", default="smollm2-135m", show_default=True, help="Embedded model, folder or hub id")
@click.option("--data", type=click.Path(path_type=Path), required=True, help="Greedy answers of the model")
@click.option("--adapter", "entries", multiple=True, required=True, help="Folder of mask tokens")
@click.option(
    "--every", default=1, show_default=True, type=click.IntRange(1), help="Every N-th position only"
)
@click.option("--limit", type=click.IntRange(1), help="The first N answers only")
@click.option(
    "--max-length", default=4096, show_default=True, help="Truncate rows at this length; drop longer prompts"
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of a table")
def main(
    model: str,
    data: Path,
    entries: tuple[str, ...],
    every: int,
    limit: int | None,
    max_length: int,
    as_json: bool,
) -> None:
    """Print a table of AR and CAR by depth, with two rows per adapter."""
    prefer_openblas()
    from mtp_mlx import load
    from mtp_mlx.train.data import load_examples

    attached, tokenizer = load(model, None)
    base = attached.model
    attached.detach()
    adapters = load_adapters(base, entries)
    examples, report = load_examples(data, tokenizer, max_length, vocab_size=attached.vocab_size)
    found = [
        {
            "adapter": entry,
            "ar": result.acceptance,
            "car": [float(value) for value in np.cumprod(result.acceptance)],
            "tokens_per_step": result.tokens_per_step,
            "positions": result.blocks,
        }
        for entry, result in zip(entries, measure(base, adapters, examples[:limit], every), strict=True)
    ]
    if as_json:
        click.echo(json.dumps(found))
        return
    most = max(adapter.drafts for adapter in adapters)
    depths = " | ".join(str(depth) for depth in range(1, most + 1))
    click.echo(f"| adapter | rate | {depths} | tok/step |\n|---|---|{'---|' * (most + 1)}")
    for row in found:
        click.echo("\n".join(table_rows(row, most)))
    click.echo(
        f"\n{min(row['positions'] for row in found)} positions of {len(examples[:limit])} rows of {data.name}; "
        f"{report.dropped} rows dropped, whose prompts fill {max_length} tokens; {report.truncated} truncated"
    )


if __name__ == "__main__":
    main()
