"""What the planner of `auto` expected and what came, on answers that are known: `bench --explain` without mlx-lm.

    mtp-mlx distill --prompts prompts.jsonl --out answers.jsonl --max-tokens 64
    python benchmarks/planner_run.py --data answers.jsonl --adapter demo-heads

The answers must be the model's own greedy ones; every text is compared with its answer. There is no ratio, because
nothing is timed beside it: that is what `mtp-mlx bench` is for.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mtp_mlx.blas import prefer_openblas

if TYPE_CHECKING:
    from mtp_mlx.model.attach import AttachedModel
    from mtp_mlx.planning.explain import Explanation
    from mtp_mlx.train.data import Example

LONGEST = 1 << 20  # tokens of a text: none is cut
WARM_UP = 24  # tokens of the first answer that are written once before anything counts; short texts measure no costs


@dataclass
class Total:
    """Of all answers.

    Attributes:
        answers, equal: how many, and how many of them were written token for token.
        tokens, steps: of the answers.
        seconds: of them with their prompts.
    """

    answers: int = 0
    equal: int = 0
    tokens: int = 0
    steps: int = 0
    seconds: float = 0.0


def write(attached: AttachedModel, example: Example, most: int, total: Total) -> None:
    """Writes an answer, at most `most` tokens of it, and adds it to the total."""
    from mtp_mlx.decode.loop import mtp_generate_step
    from mtp_mlx.decode.stats import DecodeStats
    from mtp_mlx.planning.choose import plan_drafting

    answer, stats = example.tokens[example.loss_start :][:most], DecodeStats()
    drafting = plan_drafting(attached, "auto", None, stats)
    started = time.perf_counter()
    steps = mtp_generate_step(
        example.tokens[: example.loss_start],
        attached,
        max_tokens=len(answer),
        policy=drafting.policy,
        lookup=drafting.lookup,
        stats=stats,
    )
    with closing(steps):
        written = [step.token for step in steps]
    total.seconds += time.perf_counter() - started
    total.answers += 1
    total.equal += written == answer
    total.tokens += len(written)
    total.steps += stats.steps


def run(attached: AttachedModel, examples: Sequence[Example]) -> tuple[Total, Explanation]:
    """Writes all answers; shows progress on stderr."""
    from rich.console import Console
    from rich.progress import track

    from mtp_mlx.measure.explained import recorded

    write(attached, examples[0], WARM_UP, Total())  # measures what steps cost, too
    total = Total()
    with recorded() as recording:
        for example in track(examples, "answers", console=Console(stderr=True)):
            write(attached, example, LONGEST, total)
        return total, recording.explained()


def _as_object(total: Total, found: Explanation) -> dict[str, Any]:
    """As JSON; the seconds of planned steps, taken and expected, are those of "planned"."""
    return {**asdict(total), "planned": found.to_json()}


@click.command()
@click.option("--model", default="smollm2-135m", show_default=True, help="Embedded model, folder or hub id")
@click.option("--data", type=click.Path(path_type=Path), required=True, help="Greedy answers of the model")
@click.option("--adapter", default="auto", show_default=True, help="Slots or heads, as in generate")
@click.option("--memory", help="File of mtp-mlx remember, or 'off' (default: the bundled one)")
@click.option("--limit", type=click.IntRange(1), help="Answers, spread over the file")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of tables")
def main(model: str, data: Path, adapter: str, memory: str | None, limit: int | None, as_json: bool) -> None:
    """Print what the planner expected of steps and drafts, and what came. Exit code 1 if a text differs."""
    prefer_openblas()
    from rich.console import Console

    from mtp_mlx import load
    from mtp_mlx.errors import MTPError
    from mtp_mlx.measure.explained import tables
    from mtp_mlx.train.data import load_examples

    try:
        attached, tokenizer = load(model, adapter, memory=memory)
        examples, _ = load_examples(data, tokenizer, LONGEST, vocab_size=attached.vocab_size)
    except MTPError as error:
        raise click.UsageError(str(error)) from error
    count = min(limit or len(examples), len(examples))
    total, found = run(attached, [examples[number * len(examples) // count] for number in range(count)])
    if as_json:
        click.echo(json.dumps(_as_object(total, found)))
    else:
        Console(width=120).print(*tables(found))
        taken = sum(form.seconds for form in found.forms)
        expected = sum(form.expected_seconds for form in found.forms)
        click.echo(
            f"{total.equal} of {total.answers} texts equal, {total.tokens / max(total.steps, 1):.2f} tokens per step"
        )
        click.echo(f"planned steps took {taken:.1f} s, expected {expected:.1f} s")
    raise SystemExit(total.equal < total.answers)


if __name__ == "__main__":
    main()
