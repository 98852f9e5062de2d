"""Tokens per step of draft trees by rows of a step, for trained drafters, a memory, and both in one tree.

    mtp-mlx distill --prompts prompts.jsonl --out answers.jsonl --max-tokens 64
    python benchmarks/tree_acceptance.py --data answers.jsonl --adapter auto --adapter demo-heads --states states

The answers must be the model's own greedy ones. They are decoded in the steps that the model would take, but the
model runs over each text only once (`known_text`). `--check N` decodes the first N really as well and compares every
step. States are kept below --states, so that another run with the same base and adapter needs no passes.
"""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mtp_mlx.blas import prefer_openblas

if TYPE_CHECKING:
    from known_text.decoding import KnownText, Lane
    from known_text.states import StateStore

    from mtp_mlx.decode.stats import DecodeStats
    from mtp_mlx.model.attach import AttachedModel
    from mtp_mlx.train.data import Example

ROWS = (4, 8, 16, 24)
LONGEST = 1 << 20  # tokens of a text: none is cut
CHAINS = {"linear": "chain", "quadratic": "quadratic"}  # layouts without branches, and their columns


@dataclass
class Row:
    """The counts of a lane, by category; "all" comes last.

    Attributes:
        name: of what drafts.
        lane: what was decoded.
        tokens, steps, rows: of the answers of each category.
        checked: answers decoded really as well.
        different: those of them whose steps were others.
    """

    name: str
    lane: Lane
    tokens: Counter[str] = field(default_factory=Counter)
    steps: Counter[str] = field(default_factory=Counter)
    rows: Counter[str] = field(default_factory=Counter)
    checked: int = 0
    different: int = 0

    @property
    def column(self) -> str:
        """Of the table."""
        return CHAINS.get(self.lane.layout, f"{self.lane.rows} rows")

    def add(self, category: str, tokens: int, stats: DecodeStats) -> None:
        """Counts an answer."""
        for key in (category, "all"):
            self.tokens[key] += tokens
            self.steps[key] += stats.steps
            self.rows[key] += stats.rows

    def check(self, known: DecodeStats, real: DecodeStats) -> None:
        """Compares the steps of an answer with those of real passes."""
        self.checked += 1
        self.different += (known.histogram, known.layouts) != (real.histogram, real.layouts)

    def tokens_per_step(self, category: str = "all") -> float:
        """Tokens of all answers over steps of all answers."""
        return self.tokens[category] / self.steps[category]

    def as_object(self) -> dict[str, Any]:
        """As JSON."""
        return {
            "drafts": self.name,
            "layout": self.lane.layout,
            "rows": self.lane.rows,
            "tokens_per_step": {key: round(self.tokens_per_step(key), 4) for key in sorted(self.steps)},
            "rows_per_step": round(self.rows["all"] / self.steps["all"], 3),
            "tokens": self.tokens["all"],
            "steps": self.steps["all"],
            "checked": self.checked,
            "different": self.different,
        }


@dataclass(frozen=True)
class Group:
    """The lanes of one adapter, or of the memory alone.

    Attributes:
        attached: the model.
        store: of its states; None if its own drafter is not used.
        rows: of the table.
    """

    attached: AttachedModel
    store: StateStore | None
    rows: list[Row]

    def known(self, example: Example) -> KnownText:
        """What takes the model's place for a text."""
        from known_text.decoding import KnownText
        from known_text.proposals import proposals_of

        made = None if self.store is None else proposals_of(self.attached, example, self.store(example))
        return KnownText(self.attached, example, made)


def lanes_of(name: str, layouts: Sequence[str], rows: Sequence[int], *, groups: bool) -> Iterator[Row]:
    """The rows of the table for drafters named as in `--drafter`.

    Args:
        groups: whether slots can stand behind every draft (layout "quadratic").
    """
    from known_text.decoding import Lane

    for layout in layouts:
        if layout == "tree":
            for count in rows:
                yield Row(name, Lane(name, layout, count))
        elif layout == "linear" or groups:
            yield Row(name, Lane(name, layout))


def groups_of(
    model: str,
    adapters: Sequence[str],
    memory: str | None,
    states: Path | None,
    plan: tuple[Sequence[str], Sequence[int]],
) -> tuple[list[Group], Any]:
    """(the lanes of every adapter and of the memory, the tokenizer).

    Args:
        plan: (layouts, rows) of the table.
    """
    from known_text.states import StateStore

    from mtp_mlx import load
    from mtp_mlx.decode.drafter import source_of

    groups: list[Group] = []
    held: dict[str, Any] = {}
    layouts, rows = plan
    for adapter in adapters or ("auto",):
        attached, tokenizer = load(model, adapter, memory=memory)
        source = source_of(attached)
        if source is None:
            raise click.UsageError(
                f"--adapter {adapter}: this model has no adapter of its own; name a folder"
            )
        own = list(lanes_of(source.name, layouts, rows, groups=source.places_slots))
        if attached.text_source is not None:
            own += lanes_of(f"{source.name},{attached.text_source.name}", ("tree",), rows, groups=False)
        groups.append(Group(attached, StateStore(attached, states, held), own))
    texts = groups[0].attached.text_source
    if texts is not None:
        groups.append(
            Group(groups[0].attached, None, list(lanes_of(texts.name, ("tree",), rows, groups=False)))
        )
    return groups, tokenizer


def measure(
    groups: Sequence[Group],
    examples: Sequence[Example],
    categories: Sequence[str],
    ends: Sequence[int],
    check: int,
) -> None:
    """Decodes every answer in every lane, the first `check` of them really as well; shows progress on stderr."""
    from known_text.decoding import decode
    from rich.console import Console
    from rich.progress import track

    most = max(len(example) - example.loss_start for example in examples)
    # Slots first: their passes give the states that most heads read, too.
    ordered = sorted(groups, key=lambda group: group.store is None or not group.store.of_slots)
    for number, example in enumerate(track(examples, "answers", console=Console(stderr=True))):
        for group in ordered:
            known = group.known(example)
            for row in group.rows:
                stats = decode(known, example, row.lane, most, ends)
                row.add(categories[number], len(example) - example.loss_start, stats)
                if number < check:
                    row.check(stats, decode(group.attached, example, row.lane, most, ends))
        for group in groups:
            if group.store is not None:
                group.store.forget()


def table(rows: Sequence[Row]) -> str:
    """A Markdown table, a line for everything that drafts; below those with a chain, what a tree brings over it."""
    found: dict[str, dict[str, float]] = defaultdict(dict)
    for row in rows:
        found[row.name.replace(",", " + ")][row.column] = row.tokens_per_step()
    columns = list(dict.fromkeys(row.column for row in rows))
    lines = [f"| drafts | {' | '.join(columns)} |", "|---" * (1 + len(columns)) + "|"]
    for name, rates in found.items():
        lines.append(_line(name, [rates.get(column) for column in columns]))
        if "chain" in rates and len(rates) > 1:
            ratios = [rates[column] / rates["chain"] if column in rates else None for column in columns]
            lines.append(_line(f"{name}, relative to the chain", ratios))
    return "\n".join(lines)


def _line(name: str, values: Sequence[float | None]) -> str:
    return f"| {name} | " + " | ".join("" if value is None else f"{value:.2f}" for value in values) + " |"


def _said(rows: Sequence[Row], data: Path) -> str:
    """What the table was made of, and what the check found."""
    first = rows[0]
    said = f"{first.tokens['all']} tokens of {data.name}"
    if first.checked:
        different = sum(row.different for row in rows)
        cases = first.checked * len(rows)
        said += f"; {first.checked} answers decoded really as well, {different} of {cases} in other steps"
    return said


def _measured(
    model: str,
    data: Path,
    adapters: tuple[str, ...],
    memory: str | None,
    plan: tuple[Sequence[str], Sequence[int]],
    states: Path | None,
    limit: int | None,
    check: int,
) -> list[Row]:
    """The rows of the table; arguments as the options, `plan` as in `groups_of`."""
    from mtp_mlx.jsonl import read_jsonl
    from mtp_mlx.train.data import load_examples

    groups, tokenizer = groups_of(model, adapters, memory, states, plan)
    examples, _ = load_examples(data, tokenizer, LONGEST, vocab_size=groups[0].attached.vocab_size)
    categories = [str(row.get("category", "-")) for _, row in read_jsonl(data)]
    count = min(limit or len(examples), len(examples))
    chosen = [number * len(examples) // count for number in range(count)]
    measure(
        groups,
        [examples[number] for number in chosen],
        [categories[number] for number in chosen],
        sorted(tokenizer.eos_token_ids),
        check,
    )
    return [row for group in groups for row in group.rows]


@click.command()
@click.option("--model", default="smollm2-135m", show_default=True, help="Embedded model, folder or hub id")
@click.option("--data", type=click.Path(path_type=Path), required=True, help="Greedy answers of the model")
@click.option("--adapter", "adapters", multiple=True, help="Slots or heads, as in generate (default: auto)")
@click.option("--memory", help="File of mtp-mlx remember, or 'off' (default: the bundled one)")
@click.option("--rows", multiple=True, type=click.IntRange(2, 64), help="Of a step (default: 4, 8, 16, 24)")
@click.option(
    "--layout",
    "layouts",
    multiple=True,
    type=click.Choice(["linear", "quadratic", "tree"]),
    help="Layout to measure (default: linear and tree)",
)
@click.option("--states", type=click.Path(path_type=Path), help="Folder to keep the model's states in")
@click.option("--limit", type=click.IntRange(1), help="Answers, spread over the file")
@click.option("--check", default=0, show_default=True, help="Answers to decode really as well")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON list instead of a table")
def main(
    model: str,
    data: Path,
    adapters: tuple[str, ...],
    memory: str | None,
    rows: tuple[int, ...],
    layouts: tuple[str, ...],
    states: Path | None,
    limit: int | None,
    check: int,
    as_json: bool,
) -> None:
    """Print tokens per step by rows for every adapter, for the memory, and for both."""
    prefer_openblas()
    from mtp_mlx.errors import MTPError

    try:
        found = _measured(
            model, data, adapters, memory, (layouts or ("linear", "tree"), rows or ROWS), states, limit, check
        )
    except MTPError as error:
        raise click.UsageError(str(error)) from error
    if as_json:
        click.echo(json.dumps([row.as_object() for row in found]))
    else:
        click.echo(f"{table(found)}\n\n{_said(found, data)}")


if __name__ == "__main__":
    main()
