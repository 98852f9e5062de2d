"""Tokens per step of a memory on answers that it has not seen, alone and with the running text, by category.

Every answer is written again as decoding would write it: drafts, the accepted ones, the model's own token. The
answers must be the base model's greedy ones; no model is run, so this takes seconds.

    mtp-mlx remember answers.jsonl --out answers.mem
    python benchmarks/memory_acceptance.py --data others.jsonl --memory answers.mem --rows 4 --rows 8

Steps of N rows verify at most N - 1 drafts. "lookup" are the drafts that every model has without a memory.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import click

from mtp_mlx.decode.tree import ROOT, DraftTree

if TYPE_CHECKING:
    from mtp_mlx.decode.lookup import TextDrafter
    from mtp_mlx.train.data import Example


@dataclass
class Count:
    """Tokens and steps of some answers, and the drafts that were made."""

    tokens: int = 0
    steps: int = 0
    drafts: int = 0

    def add(self, made: int, tokens: int) -> None:
        """One step."""
        self.tokens, self.steps, self.drafts = self.tokens + tokens, self.steps + 1, self.drafts + made

    @property
    def tokens_per_step(self) -> float:
        """Tokens of all answers over steps of all answers."""
        return self.tokens / max(self.steps, 1)

    @property
    def drafts_per_step(self) -> float:
        """Drafts over steps; fewer than may be verified where the texts know no more."""
        return self.drafts / max(self.steps, 1)


def accepted(tree: DraftTree, truth: Sequence[int]) -> int:
    """How many tokens of the text are drafted, on the path from the root."""
    children = {(parent, token): node for node, (parent, token) in enumerate(zip(tree.parents, tree.tokens))}
    node, count = ROOT, 0
    while count < len(truth) and (node, truth[count]) in children:
        node, count = children[node, truth[count]], count + 1
    return count


def replay(example: Example, drafter: TextDrafter, drafts: int, counts: Sequence[Count]) -> None:
    """Writes one answer again, with at most `drafts` drafts per step."""
    tokens, place = example.tokens, example.loss_start
    drafter.extend(tokens[:place])
    while place < len(tokens):
        tree = drafter.tree(drafts)
        written = min(accepted(tree, tokens[place : place + drafts]) + 1, len(tokens) - place)
        for count in counts:
            count.add(len(tree), written)
        drafter.extend(tokens[place : place + written])
        place += written


def measure(
    examples: Sequence[Example], categories: Sequence[str], drafter: Callable[[], TextDrafter], drafts: int
) -> dict[str, Count]:
    """{category: count}; "all" comes last."""
    found: dict[str, Count] = defaultdict(Count)
    whole = Count()
    for example, category in zip(examples, categories, strict=True):
        replay(example, drafter(), drafts, [found[category], whole])
    return {**dict(sorted(found.items())), "all": whole}


@click.command()
@click.option("--model", default="smollm2-135m", show_default=True, help="Embedded model, folder or hub id")
@click.option("--data", type=click.Path(path_type=Path), required=True, help="Greedy answers of the model")
@click.option("--memory", "path", type=click.Path(path_type=Path), required=True, help="File of remember")
@click.option("--rows", multiple=True, type=click.IntRange(2, 64), default=(8,), help="Rows per step")
@click.option("--max-length", default=4096, show_default=True, help="Truncate rows at this length")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of a table")
def main(model: str, data: Path, path: Path, rows: tuple[int, ...], max_length: int, as_json: bool) -> None:
    """Print tokens per step by rows and category."""
    from mtp_mlx.decode.lookup import LookupDrafter
    from mtp_mlx.drafters.memory.draft import MemoryDrafter
    from mtp_mlx.drafters.memory.memory_file import MemoryFile, check_vocabulary
    from mtp_mlx.drafters.memory.remember import tokenizer_of
    from mtp_mlx.drafters.memory.vocabulary import vocabulary_fingerprint
    from mtp_mlx.jsonl import read_jsonl
    from mtp_mlx.train.data import load_examples

    tokenizer, file = tokenizer_of(model), MemoryFile(path)
    check_vocabulary(file, vocabulary_fingerprint(tokenizer))
    examples, _ = load_examples(data, tokenizer, max_length)
    categories = [str(row.get("category", "-")) for _, row in read_jsonl(data)]
    vocabulary = len(tokenizer)
    drafters: dict[str, Callable[[], TextDrafter]] = {"lookup": LookupDrafter}
    for name, known, text in (("running text", None, True), ("memory", file, False), ("both", file, True)):
        for form, branching in (("chain", False), ("tree", True)):
            drafters[f"{name}, {form}"] = partial(
                MemoryDrafter, known, vocabulary, running_text=text, branching=branching
            )
    found = [
        Row(name, count, measure(examples, categories, make, count - 1))
        for name, make in drafters.items()
        for count in rows
    ]
    click.echo(json.dumps([row.as_object() for row in found]) if as_json else table(found))


class Row(NamedTuple):
    """The counts of a drafter, by category; "all" comes last."""

    name: str
    rows: int
    counts: dict[str, Count]

    def as_object(self) -> dict[str, object]:
        """As JSON."""
        rates = {category: round(count.tokens_per_step, 3) for category, count in self.counts.items()}
        drafts = round(self.counts["all"].drafts_per_step, 2)
        return {"drafter": self.name, "rows": self.rows, "drafts_per_step": drafts, "tokens_per_step": rates}


def table(rows: Sequence[Row]) -> str:
    """A Markdown table, a line per drafter and number of rows."""
    categories = list(rows[0].counts)
    lines = [f"| drafter | rows | drafts | {' | '.join(categories)} |", "|---" * (3 + len(categories)) + "|"]
    for row in rows:
        cells = [f"{count.tokens_per_step:.2f}" for count in row.counts.values()]
        drafts = row.counts["all"].drafts_per_step
        lines.append(f"| {row.name} | {row.rows} | {drafts:.1f} | {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
