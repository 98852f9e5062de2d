"""What the planner makes of drafts from text, on greedy answers that are written again without running a model.

    python benchmarks/planner_replay.py --data answers.jsonl --memory answers.mem

A step costs what the curve says, so the ratio is tokens per second relative to plain decoding if steps cost that. The
answers must be the base model's greedy ones. The chances of the drafts are checked against what became of them.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import click

from mtp_mlx.blas import prefer_openblas

if TYPE_CHECKING:
    from mtp_mlx.decode.lookup import TextDrafter
    from mtp_mlx.planning.cost import StepCost
    from mtp_mlx.planning.experience import Experience
    from mtp_mlx.train.data import Example

CURVE = "1:1 2:1.15 3:1.28 4:1.38 6:1.55 8:1.72 12:2 16:2.25 24:2.8"  # a CPU with two cores, in plain steps


@dataclass
class Sum:
    """Totals over answers."""

    tokens: int = 0
    steps: int = 0
    rows: int = 0
    seconds: float = 0.0


def curve_cost(curve: str) -> StepCost:
    """The costs of a curve like "1:1 2:1.2 8:2", in plain steps.

    Raises:
        click.UsageError: it is none.
    """
    from mtp_mlx.planning.cost import StepCost

    try:
        points = [(int(rows), float(cost)) for rows, cost in (pair.split(":") for pair in curve.split())]
    except ValueError as error:
        raise click.UsageError(f"--curve {curve!r}: pairs like 1:1 2:1.2 8:2 are needed") from error
    rows, seconds = zip(*points, strict=True)
    return StepCost(rows, (0, 1000), seconds, seconds, (1,), (0.0,), 0.0, (1.0, 1.0))


def replay(
    example: Example, drafter: TextDrafter, cost: StepCost, experience: Experience, branches: bool
) -> Sum:
    """Writes one answer again with the planner's layouts."""
    from mtp_mlx.decode.policy import Proposal
    from mtp_mlx.planning.budget import BudgetPolicy

    policy, total = BudgetPolicy(cost, 0, [], "", experience), Sum()
    tokens, place = example.tokens, example.loss_start
    drafter.extend(tokens[:place])
    policy.begin(0, branches=branches)
    while place < len(tokens):
        tree = drafter.tree(min(policy.max_drafts, len(tokens) - place - 1))
        proposal, layout = policy.choose([Proposal(""), Proposal(drafter.name, tree)])
        written = [tokens[place]]
        children = {(p, t): n for n, (p, t) in enumerate(zip(proposal.tree.parents, proposal.drafts))}
        node = -1
        while (node, written[-1]) in children and place + len(written) < len(tokens):
            node = children[node, written[-1]]
            written.append(tokens[place + len(written)])
        seconds = cost.seconds(layout, 0)
        policy.observe(proposal, layout, written, seconds)
        drafter.extend(written)
        place += len(written)
        total = Sum(
            total.tokens + len(written), total.steps + 1, total.rows + layout.rows, total.seconds + seconds
        )
    return total


def measured(
    name: str, examples: Sequence[Example], make: Callable[[], TextDrafter], cost: StepCost, branches: bool
) -> dict:
    """Totals over all answers, and what the planner expected."""
    from mtp_mlx.measure.explained import recorded
    from mtp_mlx.planning.experience import Experience

    experience, whole = Experience.fresh("", 0, []), Sum()
    with recorded() as recording:
        for example in examples:
            one = replay(example, make(), cost, experience, branches)
            for field in ("tokens", "steps", "rows", "seconds"):
                setattr(whole, field, getattr(whole, field) + getattr(one, field))
        planned = recording.explained()
    return {
        "drafts": name,
        "tokens_per_step": whole.tokens / whole.steps,
        "rows_per_step": whole.rows / whole.steps,
        "ratio": whole.tokens / whole.seconds,
        "planned": planned,
    }


@click.command()
@click.option("--model", default="smollm2-135m", show_default=True, help="Embedded model, folder or hub id")
@click.option("--data", type=click.Path(path_type=Path), required=True, help="Greedy answers of the model")
@click.option("--memory", "path", type=click.Path(path_type=Path), help="File of remember")
@click.option("--curve", default=CURVE, show_default=True, help="rows:cost pairs, in plain steps")
@click.option("--limit", type=click.IntRange(1), help="Answers, spread over the file")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of tables")
def main(model: str, data: Path, path: Path | None, curve: str, limit: int | None, as_json: bool) -> None:
    """Print tokens per step, rows per step and the ratio by drafter, and how right the chances were."""
    prefer_openblas()
    from rich.console import Console

    from mtp_mlx.decode.lookup import LookupDrafter
    from mtp_mlx.drafters.memory.draft import MemoryDrafter
    from mtp_mlx.drafters.memory.memory_file import MemoryFile
    from mtp_mlx.drafters.memory.remember import tokenizer_of
    from mtp_mlx.measure.explained import tables
    from mtp_mlx.planning.choose import SHORTEST_PLANNED
    from mtp_mlx.train.data import load_examples

    tokenizer, cost = tokenizer_of(model), curve_cost(curve)
    examples, _ = load_examples(data, tokenizer, 4096)
    examples = examples[:: max(1, len(examples) // limit)][:limit] if limit else examples
    file, size = MemoryFile(path) if path else None, len(tokenizer)
    makers: dict[str, tuple[Callable[[], TextDrafter], bool]] = {
        "lookup": (lambda: LookupDrafter(shortest=SHORTEST_PLANNED), False),
        "running text, chain": (lambda: MemoryDrafter(None, size), False),
        "running text, tree": (lambda: MemoryDrafter(None, size, branching=True), True),
    }
    if file is not None:
        makers["memory, chain"] = (lambda: MemoryDrafter(file, size), False)
        makers["memory, tree"] = (lambda: MemoryDrafter(file, size, branching=True), True)
    found = [measured(name, examples, make, cost, branches) for name, (make, branches) in makers.items()]
    if as_json:
        click.echo(json.dumps([{**row, "planned": row["planned"].to_json()} for row in found]))
        return
    click.echo("| drafts | tokens per step | rows per step | ratio |\n|---|---|---|---|")
    for row in found:
        numbers = (row["tokens_per_step"], row["rows_per_step"], row["ratio"])
        click.echo(f"| {row['drafts']} | " + " | ".join(f"{number:.2f}" for number in numbers) + " |")
    for row in found:
        click.echo(f"\n{row['drafts']}")
        Console(width=120).print(*tables(row["planned"]))


if __name__ == "__main__":
    main()
