"""Prompts to measure with: rows of a JSONL file, or the few that ship with the package.

Rows have `prompt`, `question` or `turns` (the first is asked), and optionally `category` and `task_id`. What makes an
answer right is the last number of `answer`, as in GSM8K. Rows of HumanEval and MBPP are known by their fields (see
`mtp_mlx.measure.code_tasks`); their answers are measured and not run.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import Any

from mtp_mlx.errors import MTPError
from mtp_mlx.jsonl import read_jsonl
from mtp_mlx.measure.code_tasks import CodeTask, code_task

_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?|-?\.\d+")


@dataclass(frozen=True)
class Prompt:
    """One user message.

    Attributes:
        text: the message.
        category: it is reported under.
        name: its `task_id`, or the file's name and the line.
        answer: the number that a right answer ends in; None if unknown.
        code: for rows of HumanEval and MBPP.
    """

    text: str
    category: str = "all"
    name: str = ""
    answer: Decimal | None = None
    code: CodeTask | None = None

    @property
    def raw(self) -> str:
        """What the model continues where no chat template is used."""
        return self.text if self.code is None else self.code.prompt

    def is_right(self, answer: str) -> bool | None:
        """Whether the last number in `answer` is the reference's ("flexible extract"); None without a reference."""
        return None if self.answer is None else last_number(answer) == self.answer


BUILT_IN = tuple(
    Prompt(text, category, f"built-in/{number}")
    for number, (category, text) in enumerate(
        (
            ("explain", "Explain why the sky is blue."),
            ("explain", "What is the difference between weather and climate?"),
            ("code", "Write a Python function that reverses a linked list, with comments."),
            ("code", "Write a shell command that counts the lines of every .txt file in a folder."),
            (
                "math",
                "A train travels 60 km in 45 minutes. What is its speed in km per hour? Show the steps.",
            ),
            ("math", "If 3 pencils cost 1.20 euros, how much do 10 pencils cost? Show the steps."),
            (
                "summary",
                "Summarise in one sentence: The lighthouse was built in 1861 on a rock two miles from the coast. Its "
                "lamp was turned by hand until 1923, when an electric motor was fitted, and since 1982 it has run "
                "unattended.",
            ),
            ("copy", "Repeat the following list three times: apples, pears, plums, cherries, grapes."),
        )
    )
)


def last_number(text: str) -> Decimal | None:
    """The last number in a text, without its thousands separators; None if there is none."""
    found = _NUMBER.findall(text)
    try:
        return Decimal(found[-1].replace(",", "").rstrip(".")) if found else None
    except InvalidOperation:
        return None


# --- files --------------------------------------------------------------------------------------------------


def read_prompts(
    path: Path | None, limit: int | None = None, per_category: int | None = None
) -> list[Prompt]:
    """Prompts to time, without their answers.

    Args:
        path: a JSONL file, or None for the built-in prompts. A row without a category is reported under "all".
        limit: at most this many, spread evenly over the file, so that its mix of categories is kept.
        per_category: at most this many of each category, the first ones.

    Raises:
        MTPError: no such file, a bad line (with its number), or no prompt.
    """
    return _read(path, limit, per_category, lambda row, where: _prompt(row, where, "all"))


def read_questions(path: Path | None, limit: int | None = None) -> list[Prompt]:
    """Prompts whose answers count: `answer` is a text whose last number is right (behind "####" in GSM8K).

    A row without a category is reported under the file's name. Arguments and errors as `read_prompts`.
    """
    category = "all" if path is None else path.stem
    return _read(path, limit, None, lambda row, where: _question(row, where, category))


def read_gsm8k(path: Path, limit: int | None = None) -> list[Prompt]:
    """Questions that all have an answer, in the category "gsm8k". Arguments and errors as `read_prompts`."""

    def with_answer(row: dict[str, Any], where: str) -> Prompt:
        prompt = _question(row, where, "gsm8k")
        if prompt.answer is None:
            raise MTPError(f"{where}: GSM8K rows need `question` and `answer`")
        return replace(prompt, category="gsm8k")

    return _read(path, limit, None, with_answer)


def _read(
    path: Path | None,
    limit: int | None,
    per_category: int | None,
    prompt_of: Callable[[dict[str, Any], str], Prompt],
) -> list[Prompt]:
    found = list(BUILT_IN)
    if path is not None:
        found = []
        for number, row in read_jsonl(path):
            prompt = prompt_of(row, f"{path}, line {number}")
            found.append(prompt if prompt.name else replace(prompt, name=f"{path.stem}/{number}"))
    if not found:
        raise MTPError(f"{path}: no prompt. Write one JSON object with a `prompt` or `question` per line.")
    if per_category is not None:
        seen: Counter[str] = Counter()
        found = [prompt for prompt in found if _count(seen, prompt.category) <= per_category]
    if limit is not None and limit < len(found):
        found = [found[index * len(found) // limit] for index in range(limit)]
    return found


def _count(seen: Counter[str], category: str) -> int:
    seen[category] += 1
    return seen[category]


def _prompt(row: dict[str, Any], where: str, category: str) -> Prompt:
    """The prompt of one row; its name is "" without a `task_id`."""
    code = code_task(row, where)
    category = str(row.get("category", category))
    if code is not None:
        return Prompt(code.message, category, _task_id(row, where, f"{code.benchmark}/"), code=code)
    turns = row.get("turns")
    text = (
        row.get("question") or row.get("prompt") or (turns[0] if isinstance(turns, list) and turns else None)
    )
    if not isinstance(text, str) or not text.strip():
        raise MTPError(f"{where}: needs `question`, `prompt` (a text) or `turns` (a list of texts)")
    return Prompt(text, category, _task_id(row, where))


def _question(row: dict[str, Any], where: str, category: str) -> Prompt:
    prompt = _prompt(row, where, category)
    if prompt.code is not None or row.get("answer") is None:
        return prompt
    answer = last_number(str(row["answer"]).rsplit("####", 1)[-1])
    if answer is None:
        raise MTPError(f"{where}: `answer` has no number to compare with; leave it out or add one")
    return replace(prompt, answer=answer)


def _task_id(row: dict[str, Any], where: str, prefix: str = "") -> str:
    """The row's own name as text, "" if it has none. A number gets the prefix: 11 of MBPP is "Mbpp/11"."""
    value = row.get("task_id")
    if value is None:
        return ""
    if isinstance(value, bool) or not isinstance(value, str | int) or value == "":
        raise MTPError(f"{where}: `task_id` must be a text or a whole number")
    return value if isinstance(value, str) else f"{prefix}{value}"
