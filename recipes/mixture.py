"""Write one training file of several sources: rows of rare categories are seen more often, by their "weight".

    python recipes/mixture.py own.jsonl:0.6 written.jsonl:0.3 speeches.txt:0.1 --categories recipes/categories.yaml
        --prompts prompts.jsonl --out mixture.jsonl

Sources are JSONL files in the formats that `mtp-mlx train` reads, or .txt files, which become {"text": ...} rows of
whole paragraphs. The number behind each is its share: how often one of its rows is seen, of all rows seen. Several
files joined by commas are one source.

Within a source, categories are seen as often as CATEGORIES says, a YAML file of "category: share"; those that a
source does not have leave their share to the others. A row has its category in "category", or else PROMPTS has it, in
the row with the same "id" or prompt. A source of which no row has a category is seen evenly.

No row is copied or left out. Later, `mtp-mlx train` draws rows by their weights.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import yaml

from mtp_mlx.errors import MTPError
from mtp_mlx.files import write_text
from mtp_mlx.jsonl import read_jsonl

# What training reads of a row, besides "weight".
FIELDS = ("messages", "prompt", "completion", "response", "text")
FIELDS += ("tools", "chat_template_kwargs", "finished", "response_tokens")
PIECE = 1600  # characters of a {"text": ...} row at most, unless a paragraph is longer


@dataclass(frozen=True)
class Source:
    """Rows that have a share together.

    Attributes:
        name: for messages.
        rows: as read.
        share: of all rows that training sees.
    """

    name: str
    rows: list[dict[str, Any]]
    share: float


def read_source(text: str) -> Source:
    """The source that "FILE,FILE:SHARE" names.

    Raises:
        MTPError: there is no share, or a file cannot be read or is empty.
    """
    names, _, share = text.rpartition(":")
    try:
        value = float(share)
    except ValueError:
        value = 0.0
    if not names or not value > 0:
        raise MTPError(f"{text}: give each source as FILE:SHARE, with a positive number, as in own.jsonl:0.6")
    rows = [row for name in names.split(",") for row in read_rows(Path(name))]
    if not rows:
        raise MTPError(f"{names} has no rows")
    return Source(names, rows, value)


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Rows of a JSONL file, or pieces of a text file."""
    if path.suffix != ".txt":
        return [row for _, row in read_jsonl(path)]
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise MTPError(f"{path}: cannot be read as UTF-8 text ({error})") from error
    return [{"text": piece} for piece in pieces(text)]


def pieces(text: str) -> list[str]:
    """The text in pieces of at most `PIECE` characters that end where a paragraph ends."""
    found: list[str] = []
    for paragraph in filter(None, (part.strip() for part in text.split("\n\n"))):
        if found and len(found[-1]) + len(paragraph) + 2 <= PIECE:
            found[-1] += f"\n\n{paragraph}"
        else:
            found.append(paragraph)
    return found


def known_categories(path: Path | None) -> dict[str, str]:
    """{id or prompt: category} of a file of prompts."""
    found: dict[str, str] = {}
    for _, row in () if path is None else read_jsonl(path):
        if "category" in row:
            found |= {str(row[key]): str(row["category"]) for key in ("id", "prompt") if key in row}
    return found


def category_of(row: dict[str, Any], known: dict[str, str]) -> str | None:
    """The category of a row, or None."""
    if "category" in row:
        return str(row["category"])
    return known.get(str(row.get("id"))) or known.get(str(row.get("prompt")))


def read_shares(path: Path) -> dict[str, float]:
    """{category: share} of a YAML file.

    Raises:
        MTPError: it cannot be read, or is something else.
    """
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise MTPError(f"{path}: cannot be read ({error})") from error
    if not isinstance(values, dict) or not all(_positive(value) for value in values.values()):
        raise MTPError(f'{path}: each line must be "category: share", with a positive number')
    return {str(category): float(value) for category, value in values.items()}


def _positive(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < float("inf")


def weights(source: Source, shares: dict[str, float], known: dict[str, str], sampled: float) -> list[float]:
    """Weights of a source's rows; their sum is 1.

    Args:
        sampled: factor of rows whose "temperature" is above 0.

    Raises:
        MTPError: only some rows have a category, or one has no share.
    """
    found = [category_of(row, known) for row in source.rows] if shares else []
    factors = [sampled if row.get("temperature", 0) else 1.0 for row in source.rows]
    if not any(found):
        return _normalised(factors)
    if None in found:
        raise MTPError(
            f'{source.name}: row {found.index(None) + 1} has no "category", and `prompts` has none for it; others do'
        )
    missing = sorted({str(category) for category in found} - shares.keys())
    if missing:
        raise MTPError(f"{source.name} has rows of {', '.join(missing)}, of which `categories` has no share")
    rows = list(zip(map(str, found), factors, strict=True))
    totals: defaultdict[str, float] = defaultdict(float)
    for category, factor in rows:
        totals[category] += factor
    return _normalised(shares[category] * factor / totals[category] for category, factor in rows)


def _normalised(values: Iterable[float]) -> list[float]:
    found = list(values)
    total = sum(found)
    return [value / total for value in found]


def mixture(
    sources: list[Source], shares: dict[str, float], known: dict[str, str], sampled: float = 1.0
) -> list[dict[str, Any]]:
    """The rows of all sources, with weights whose mean is 1. Raises as `weights`."""
    count = sum(len(source.rows) for source in sources)
    whole = sum(source.share for source in sources)
    rows = []
    for source in sources:
        for row, weight in zip(source.rows, weights(source, shares, known, sampled), strict=True):
            kept = {name: row[name] for name in FIELDS if name in row}
            rows.append({**kept, "weight": float(f"{count * weight * source.share / whole:.6g}")})
    return rows


@click.command(help=__doc__)
@click.argument("sources", nargs=-1, required=True, metavar="FILE:SHARE...")
@click.option("--out", type=click.Path(path_type=Path), required=True, help="JSONL file to write")
@click.option(
    "--categories", type=click.Path(path_type=Path), help="YAML file with the share of each category"
)
@click.option("--prompts", type=click.Path(path_type=Path), help="JSONL file that has the rows' categories")
@click.option(
    "--sampled",
    type=click.FloatRange(0, min_open=True),
    default=1.0,
    show_default=True,
    help="Weight of answers sampled at a temperature above 0, relative to greedy ones",
)
def main(
    sources: tuple[str, ...], out: Path, categories: Path | None, prompts: Path | None, sampled: float
) -> None:
    """See the module."""
    try:
        read = [read_source(source) for source in sources]
        shares = {} if categories is None else read_shares(categories)
        rows = mixture(read, shares, known_categories(prompts), sampled)
        write_text(out, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    except MTPError as error:
        raise click.UsageError(str(error)) from error
    click.echo(f"{len(rows)} rows of {len(read)} sources -> {out}", err=True)


if __name__ == "__main__":
    main()
