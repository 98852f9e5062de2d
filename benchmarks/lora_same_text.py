"""Check that a fine-tune that mlx_lm.lora trains decodes here, with drafts, to mlx-lm's own text.

Trains a LoRA for a few steps in a temporary folder. Greedy texts of the model with it are then compared: mlx-lm's,
and this package's in several layouts. A difference is accepted only with a near-tie certificate (see
`mtp_mlx/measure/certificate.py`). The exit code is 1 if a text differs, or if the fine-tune changes none, which would
prove nothing.

    python benchmarks/lora_same_text.py
    python benchmarks/lora_same_text.py --adapter demo-heads --layout auto --layout linear --layout tree
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any

import click

from mtp_mlx.blas import prefer_openblas

LAYOUTS = ("auto", "quadratic", "tree")
# What the fine-tune learns to say.
PLACES = ("Oslo", "Lima", "Cairo", "Quito", "Hanoi", "Turin", "Perth", "Dakar")
ANSWER = "Ahoy! {place} lies where the gulls cry and the tide is high, and any sailor will tell you the rest."


@dataclass
class Row:
    """How many texts of a layout are mlx-lm's, and how many tokens a pass gave."""

    layout: str
    same: int = 0
    near_ties: int = 0
    different: int = 0
    tokens_per_step: float = 0.0


@click.command()
@click.option("--model", default="smollm2-135m", show_default=True, help="Embedded model, folder or hub id")
@click.option("--adapter", default="auto", show_default=True, help="The drafter: adapter folder or its name")
@click.option("--layout", "layouts", multiple=True, default=LAYOUTS, show_default=True, help="Repeatable")
@click.option("--steps", default=20, show_default=True, help="Training steps of the fine-tune")
@click.option("--learning-rate", default=5e-4, show_default=True, help="Of the fine-tune")
@click.option("--prompts", type=click.Path(path_type=Path), help="JSONL file of prompts")
@click.option("--limit", default=4, show_default=True, help="Number of prompts, spread over the file")
@click.option("--max-tokens", default=48, show_default=True, help="Tokens per prompt")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of a table")
@click.pass_context
def main(
    context: click.Context,
    model: str,
    adapter: str,
    layouts: tuple[str, ...],
    steps: int,
    learning_rate: float,
    prompts: Path | None,
    limit: int,
    max_tokens: int,
    as_json: bool,
) -> None:
    """Print for each layout how many texts are mlx-lm's."""
    prefer_openblas()
    import mlx_lm

    from mtp_mlx import chat_prompt
    from mtp_mlx.measure.prompts import read_prompts
    from mtp_mlx.models import resolve_model

    path = str(resolve_model(model))
    with TemporaryDirectory() as folder:
        train(path, Path(folder), steps, learning_rate)
        tune = f"{folder}/adapters"
        tuned, tokenizer = mlx_lm.load(path, adapter_path=tune)[:2]
        asked = [chat_prompt(tokenizer, prompt.text) for prompt in read_prompts(prompts, limit)]
        references = [text_of_mlx_lm(tuned, tokenizer, ids, max_tokens) for ids in asked]
        base = mlx_lm.load(path)[0]
        changed = sum(
            text_of_mlx_lm(base, tokenizer, ids, max_tokens) != reference
            for ids, reference in zip(asked, references, strict=True)
        )
        rows = [
            compared(model, adapter, tune, layout, asked, references, tuned, max_tokens) for layout in layouts
        ]
    found = {
        "prompts": len(asked),
        "changed by the fine-tune": changed,
        "rows": [asdict(row) for row in rows],
    }
    click.echo(json.dumps(found) if as_json else table(found))
    context.exit(1 if changed == 0 or any(row.different for row in rows) else 0)


def train(model: str, folder: Path, steps: int, learning_rate: float) -> None:
    """A LoRA of all layers in `folder`/adapters, as `mlx_lm.lora --train` writes it."""
    from mlx_lm import lora

    (folder / "data").mkdir()
    for name, places in (("train", PLACES[:6]), ("valid", PLACES[6:])):
        data = [{"prompt": f"Where is {p}?", "completion": ANSWER.format(place=p)} for p in places]
        (folder / "data" / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in data))
    own = {
        "model": model,
        "train": True,
        "data": str(folder / "data"),
        "adapter_path": str(folder / "adapters"),
        "iters": steps,
        "batch_size": 1,
        "num_layers": -1,
        "val_batches": 1,
        "learning_rate": learning_rate,
        "max_seq_length": 256,
    }
    with redirect_stdout(sys.stderr):
        lora.run(SimpleNamespace(**{**lora.CONFIG_DEFAULTS, **own}))


def text_of_mlx_lm(model: Any, tokenizer: Any, ids: Sequence[int], max_tokens: int) -> list[int]:
    """The tokens that mlx-lm's greedy decoding writes, with that which ends the text."""
    import mlx.core as mx
    from mlx_lm.generate import generate_step

    written: list[int] = []
    for token, _ in generate_step(mx.array(list(ids)), model, max_tokens=max_tokens):
        written.append(int(token))
        if written[-1] in tokenizer.eos_token_ids:
            break
    return written


def compared(
    name: str,
    adapter: str,
    tune: str,
    layout: str,
    asked: Sequence[list[int]],
    references: Sequence[list[int]],
    tuned: Any,
    max_tokens: int,
) -> Row:
    """Decodes the prompts in a layout, and compares the texts; `tuned` measures near-ties."""
    from mtp_mlx import load, stream_generate
    from mtp_mlx.decode.stats import DecodeStats
    from mtp_mlx.measure.certificate import compare

    model, tokenizer = load(name, adapter, adapter_path=tune)
    row, stats = Row(layout), DecodeStats()
    for ids, reference in zip(asked, references, strict=True):
        responses = stream_generate(model, tokenizer, ids, max_tokens, layout=layout, stats=stats)
        found = compare(tuned, ids, reference, [response.token for response in responses])
        row.same += found.identical
        row.near_ties += found.certified
        row.different += not (found.identical or found.certified)
    row.tokens_per_step = round(stats.tokens_per_step, 2)
    return row


def table(found: dict[str, Any]) -> str:
    """A Markdown table."""
    lines = [
        f"{found['changed by the fine-tune']} of {found['prompts']} texts are changed by the fine-tune.",
        "",
        "| layout | same as mlx-lm | near-ties | different | tokens per step |",
        "|---|---|---|---|---|",
    ]
    return "\n".join([*lines, *(f"| {' | '.join(map(str, row.values()))} |" for row in found["rows"])])


if __name__ == "__main__":
    main()
