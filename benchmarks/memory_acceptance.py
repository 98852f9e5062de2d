"""Tokens per step of a memory on answers that it has not seen, alone and with the running text, by category.

Every answer is written again as decoding would write it: a chain of drafts, the accepted ones, the model's own token.
The answers must be the base model's greedy ones; no model is run, so this takes seconds.

    mtp-mlx remember answers.jsonl --out answers.mem
    python benchmarks/memory_acceptance.py --data others.jsonl --memory answers.mem --drafts 3 --drafts 7

N drafts make steps of N + 1 rows. "lookup" are the drafts that every model has without a memory.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import click

from mtp_mlx.blas import prefer_openblas

if TYPE_CHECKING:
    from mtp_mlx.decode.lookup import TextDrafter
    from mtp_mlx.train.data import Example


@dataclass
class Count:
    """Tokens and steps of some answers, the drafts that were made, and how often each depth was reached and right."""

    tokens: int = 0
    steps: int = 0
    drafts: int = 0
    reached: list[int] = field(default_factory=lambda: [0] * 64)
    right: list[int] = field(default_factory=lambda: [0] * 64)

    def add(self, made: int, accepted: int, tokens: int) -> None:
        """One step."""
        self.tokens, self.steps, self.drafts = self.tokens + tokens, self.steps + 1, self.drafts + made
        for depth in range(min(made, accepted + 1)):
            self.reached[depth] += 1
            self.right[depth] += depth < accepted

    @property
    def tokens_per_step(self) -> float:
        """Tokens of all answers over steps of all answers."""
        return self.tokens / max(self.steps, 1)

    def acceptance(self, depths: int) -> list[float]:
        """[depths] share of drafts that are right, of those whose predecessors are."""
        return [right / max(reached, 1) for right, reached in zip(self.right[:depths], self.reached[:depths])]


def replay(example: Example, drafter: TextDrafter, drafts: int, counts: Sequence[Count]) -> None:
    """Writes one answer again, with at most `drafts` drafts per step."""
    tokens, place = example.tokens, example.loss_start
    drafter.extend(tokens[:place])
    while place < len(tokens):
        proposed = drafter.tree(drafts).tokens
        truth = tokens[place : place + len(proposed)]
        accepted = next((i for i, pair in enumerate(zip(proposed, truth)) if pair[0] != pair[1]), len(truth))
        written = min(accepted + 1, len(tokens) - place)
        for count in counts:
            count.add(len(proposed), accepted, written)
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
@click.option("--drafts", multiple=True, type=click.IntRange(1, 63), default=(7,), help="Drafts per step")
@click.option("--max-length", default=4096, show_default=True, help="Truncate rows at this length")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of a table")
def main(model: str, data: Path, path: Path, drafts: tuple[int, ...], max_length: int, as_json: bool) -> None:
    """Print tokens per step by drafts and category."""
    prefer_openblas()
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
    drafters: dict[str, Callable[[], TextDrafter]] = {
        "lookup": LookupDrafter,
        "running text": lambda: MemoryDrafter(None, vocabulary),
        "memory": lambda: MemoryDrafter(file, vocabulary, running_text=False),
        "memory and running text": lambda: MemoryDrafter(file, vocabulary),
    }
    rows = [
        (name, most, measure(examples, categories, make, most))
        for name, make in drafters.items()
        for most in drafts
    ]
    click.echo(json.dumps(as_objects(rows)) if as_json else table(rows))


Row = tuple[str, int, dict[str, Count]]


def as_objects(rows: Sequence[Row]) -> list[dict[str, object]]:
    """The rows of --json."""
    return [
        {
            "drafter": name,
            "drafts": most,
            "drafts_per_step": round(found["all"].drafts / max(found["all"].steps, 1), 3),
            "acceptance": [round(value, 3) for value in found["all"].acceptance(most)],
            "tokens_per_step": {
                category: round(count.tokens_per_step, 3) for category, count in found.items()
            },
        }
        for name, most, found in rows
    ]


def table(rows: Sequence[Row]) -> str:
    """A Markdown table, a line per drafter and number of drafts."""
    categories = list(rows[0][2])
    lines = [
        "| drafter | rows | drafts made | " + " | ".join(categories) + " |",
        "|---|" * 1 + "---|" * (2 + len(categories)),
    ]
    for name, most, found in rows:
        whole = found["all"]
        cells = [f"{count.tokens_per_step:.2f}" for count in found.values()]
        lines.append(
            f"| {name} | {most + 1} | {whole.drafts / max(whole.steps, 1):.1f} | " + " | ".join(cells) + " |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
