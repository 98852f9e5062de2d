"""Prompts to measure on: a JSONL file of the user's, or a few that ship with the package."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import Any

from mtp_mlx.errors import MTPError
from mtp_mlx.jsonl import read_jsonl


@dataclass(frozen=True)
class BenchPrompt:
    """A user message and the category it is reported under."""

    text: str
    category: str


BUILT_IN = (
    BenchPrompt("Explain why the sky is blue.", "explain"),
    BenchPrompt("What is the difference between weather and climate?", "explain"),
    BenchPrompt("Write a Python function that reverses a linked list, with comments.", "code"),
    BenchPrompt("Write a shell command that counts the lines of every .txt file in a folder.", "code"),
    BenchPrompt(
        "A train travels 60 km in 45 minutes. What is its speed in km per hour? Show the steps.", "math"
    ),
    BenchPrompt("If 3 pencils cost 1.20 euros, how much do 10 pencils cost? Show the steps.", "math"),
    BenchPrompt(
        "Summarise in one sentence: The lighthouse was built in 1861 on a rock two miles from the coast. Its lamp "
        "was turned by hand until 1923, when an electric motor was fitted, and since 1982 it has run unattended.",
        "summary",
    ),
    BenchPrompt("Repeat the following list three times: apples, pears, plums, cherries, grapes.", "copy"),
)


def read_prompts(path: Path | None, limit: int | None, per_category: int | None) -> list[BenchPrompt]:
    """Prompts of a JSONL file (`prompt` or the first of `turns`; optional `category`), or the built-in ones.

    Args:
        path: the file, or None for the built-in prompts.
        limit: at most this many, spread evenly over the file, so that its mix of categories is kept.
        per_category: at most this many of each category, the first ones.

    Raises:
        MTPError: no such file, a bad line (numbered), or no prompt left.
    """
    found = list(BUILT_IN if path is None else _from_file(path))
    if per_category is not None:
        seen: dict[str, int] = {}
        kept = []
        for prompt in found:
            seen[prompt.category] = seen.get(prompt.category, 0) + 1
            if seen[prompt.category] <= per_category:
                kept.append(prompt)
        found = kept
    if limit is not None and limit < len(found):
        found = [found[index * len(found) // limit] for index in range(limit)]
    if not found:
        raise MTPError(f"{path}: no prompt to measure. Write one JSON object with a `prompt` per line.")
    return found


def _from_file(path: Path) -> Iterator[BenchPrompt]:
    for number, row in read_jsonl(path):
        turns = row.get("turns")
        text = row.get("prompt") or (turns[0] if isinstance(turns, list) and turns else None)
        if not isinstance(text, str) or not text.strip():
            raise MTPError(f"{path}, line {number}: needs `prompt` (a text) or `turns` (a list of texts)")
        yield BenchPrompt(text, str(row.get("category", "all")))


_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?|-?\.\d+")


@dataclass(frozen=True)
class Question:
    """A user message, and the number its answer must end in, or None where that is not known."""

    text: str
    answer: Decimal | None = None

    def is_right(self, text: str) -> bool:
        """Whether the last number in `text` is the answer (the "flexible extract" of GSM8K evaluations)."""
        return self.answer is not None and last_number(text) == self.answer


def last_number(text: str) -> Decimal | None:
    """The last number in a text, thousands separators aside; None without one."""
    found = _NUMBER.findall(text)
    try:
        return Decimal(found[-1].replace(",", "").rstrip(".")) if found else None
    except InvalidOperation:
        return None


def read_questions(path: Path | None, limit: int | None) -> list[Question]:
    """Questions of a JSONL file, or the benchmark's built-in prompts, which have no answers.

    Args:
        path: rows have `question`, `prompt` or `turns`; an `answer` of any text whose last number counts (what
            stands behind GSM8K's "####").
        limit: at most this many, spread evenly over the file.

    Raises:
        MTPError: no such file, a bad line (numbered), or no question.
    """
    if path is None:
        found = [Question(prompt.text) for prompt in BUILT_IN]
    else:
        found = [question_of(path, number, row) for number, row in read_jsonl(path)]
    if not found:
        raise MTPError(f"{path}: no question. Write one JSON object with a `question` or `prompt` per line.")
    if limit is not None and limit < len(found):
        found = [found[index * len(found) // limit] for index in range(limit)]
    return found


def question_of(path: Path, number: int, row: dict[str, Any]) -> Question:
    """The question of one row. Raises MTPError as `read_questions`."""
    turns = row.get("turns")
    text = (
        row.get("question") or row.get("prompt") or (turns[0] if isinstance(turns, list) and turns else None)
    )
    if not isinstance(text, str) or not text.strip():
        raise MTPError(
            f"{path}, line {number}: needs `question`, `prompt` (a text) or `turns` (a list of texts)"
        )
    if row.get("answer") is None:
        return Question(text)
    answer = last_number(str(row["answer"]).rsplit("####", 1)[-1])
    if answer is None:
        raise MTPError(
            f"{path}, line {number}: `answer` has no number to compare with; leave it out or add one"
        )
    return Question(text, answer)
