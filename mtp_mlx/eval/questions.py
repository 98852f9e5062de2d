"""Questions to measure on, with or without a number as their answer (GSM8K's form)."""

from __future__ import annotations

import re
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import Any

from mtp_mlx.bench.prompts import BUILT_IN
from mtp_mlx.errors import MTPError
from mtp_mlx.train.data import read_jsonl

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
