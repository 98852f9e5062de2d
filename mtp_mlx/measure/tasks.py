"""What a model is asked, and who judges the answer: GSM8K, HumanEval, MBPP, or a file of prompts of one's own.

    GSM8K     rows with `question` and `answer`: right where the last number of the answer is the reference's
    HumanEval rows with `prompt`, `entry_point`, `test`: right where the code passes the tests (pass@1, greedy)
    MBPP      rows with `text`, `test_list`, `test_setup_code`: the same
    prompts   rows with `prompt`, `question` or `turns`, and a `category`

Code is only ever run in `mtp_mlx.measure.sandbox`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

from mtp_mlx.errors import MTPError
from mtp_mlx.jsonl import read_jsonl
from mtp_mlx.measure.prompts import BUILT_IN, Question, question_of
from mtp_mlx.measure.sandbox import Outcome

Item = TypeVar("Item")
FENCE = re.compile(r"```[ \t]*(?:python|py|python3)?[ \t]*\r?\n(.*?)(?:```|\Z)", re.DOTALL | re.IGNORECASE)
# Where a completed function ends: the next statement at the margin.
AFTER_FUNCTION = re.compile(r"\n(?=[^\s)\]}#'\"])")


class Runner(Protocol):
    """Runs a program's text; `mtp_mlx.measure.sandbox.Sandbox` is one."""

    def run(self, program: str) -> Outcome:
        """How it ended."""
        ...


@dataclass(frozen=True)
class Verdict:
    """Whether an answer is right, None where nobody knows; and why not, in a word."""

    right: bool | None
    reason: str = ""


class Task(Protocol):
    """One thing asked."""

    @property
    def name(self) -> str:
        """Tells it from others, such as "humaneval/3"."""
        ...

    @property
    def category(self) -> str:
        """It is reported under."""
        ...

    @property
    def message(self) -> str:
        """The user's message."""
        ...

    @property
    def raw(self) -> str:
        """The text to go on from where there is no chat template."""
        ...

    @property
    def reference(self) -> str:
        """All that a verdict depends on beside the answer, "" for nothing: with another one, verdicts are others."""
        ...

    def judge(self, answer: str) -> Verdict:
        """The verdict on an answer to `message`."""
        ...

    def judge_raw(self, answer: str) -> Verdict:
        """The verdict on a continuation of `raw`."""
        ...


@dataclass(frozen=True)
class QuestionTask:
    """A question whose answer is a number, or not known."""

    name: str
    category: str
    question: Question

    @property
    def message(self) -> str:
        """See `Task`."""
        return self.question.text

    @property
    def raw(self) -> str:
        """See `Task`."""
        return self.question.text

    @property
    def reference(self) -> str:
        """See `Task`."""
        return "" if self.question.answer is None else str(self.question.answer)

    def judge(self, answer: str) -> Verdict:
        """See `Task`."""
        if self.question.answer is None:
            return Verdict(None)
        right = self.question.is_right(answer)
        return Verdict(right, "" if right else "another number")

    def judge_raw(self, answer: str) -> Verdict:
        """See `Task`."""
        return self.judge(answer)


@dataclass(frozen=True)
class HumanEvalTask:
    """A function to be completed; its tests are called `check`."""

    name: str
    category: str
    prompt: str
    entry_point: str
    test: str
    runner: Runner

    @property
    def message(self) -> str:
        """See `Task`."""
        return (
            "Complete this Python function. Answer with the whole function in one block of code.\n\n"
            f"```python\n{self.prompt.rstrip()}\n```"
        )

    @property
    def raw(self) -> str:
        """See `Task`."""
        return self.prompt

    @property
    def reference(self) -> str:
        """See `Task`."""
        return json.dumps([self.test, self.entry_point])

    def judge(self, answer: str) -> Verdict:
        """The first block of code; where it does not define the function, it is taken for the function's body."""
        code = code_of(answer)
        if re.search(rf"def\s+{re.escape(self.entry_point)}\b", code):
            return self._tested(f"{self._preamble()}\n{code}")
        return self._tested(self.prompt + code)

    def judge_raw(self, answer: str) -> Verdict:
        """See `Task`."""
        return self._tested(self.prompt + AFTER_FUNCTION.split(answer, maxsplit=1)[0])

    def _preamble(self) -> str:
        """Imports and helpers before the function, which answers often leave out."""
        return self.prompt.split(f"def {self.entry_point}")[0]

    def _tested(self, code: str) -> Verdict:
        return _verdict(self.runner.run(f"{code}\n\n{self.test}\n\ncheck({self.entry_point})\n"))


@dataclass(frozen=True)
class MBPPTask:
    """A function to be written from a sentence and its tests."""

    name: str
    category: str
    text: str
    setup: str
    tests: tuple[str, ...]
    runner: Runner

    @property
    def message(self) -> str:
        """See `Task`."""
        return f"{self.text}\nYour code should pass these tests:\n\n" + "\n".join(self.tests)

    @property
    def raw(self) -> str:
        """See `Task`."""
        tests = "\n".join(self.tests)
        return f'"""\n{self.text}\nYour code should pass these tests:\n\n{tests}\n"""\n'

    @property
    def reference(self) -> str:
        """See `Task`."""
        return json.dumps([self.setup, self.tests])

    def judge(self, answer: str) -> Verdict:
        """The first block of code, or all of the answer where there is none."""
        return self._tested(code_of(answer))

    def judge_raw(self, answer: str) -> Verdict:
        """See `Task`."""
        return self._tested(answer)

    def _tested(self, code: str) -> Verdict:
        return _verdict(self.runner.run("\n".join([self.setup, code, *self.tests]) + "\n"))


def _verdict(outcome: Outcome) -> Verdict:
    return Verdict(outcome.passed, "" if outcome.passed else outcome.reason)


def code_of(answer: str) -> str:
    """The first fenced block, to the end where it was cut off; the whole answer without one."""
    found = FENCE.search(answer)
    return found.group(1) if found else answer


# --- files --------------------------------------------------------------------------------------------------


def read_prompt_tasks(path: Path | None, limit: int | None) -> list[Task]:
    """A file of questions or prompts by category, or the benchmark's built-in prompts.

    Raises:
        MTPError: no such file, a bad line (numbered), or none.
    """
    if path is None:
        built_in = [
            QuestionTask(f"built-in/{i}", p.category, Question(p.text)) for i, p in enumerate(BUILT_IN)
        ]
        return list(_spread(built_in, limit))
    found: list[Task] = []
    for number, row in read_jsonl(path):
        category = str(row.get("category", path.stem))
        found.append(QuestionTask(f"{path.stem}/{number}", category, question_of(path, number, row)))
    return list(_spread(_some(found, path), limit))


def read_gsm8k(path: Path, limit: int | None) -> list[Task]:
    """Rows with `question` and `answer`. Errors as `read_prompt_tasks`."""
    found: list[Task] = []
    for number, row in read_jsonl(path):
        question = question_of(path, number, row)
        if question.answer is None:
            raise MTPError(f"{path}, line {number}: GSM8K rows need `question` and `answer`")
        found.append(QuestionTask(f"gsm8k/{number}", "gsm8k", question))
    return list(_spread(_some(found, path), limit))


def read_humaneval(path: Path, limit: int | None, runner: Runner) -> list[Task]:
    """Rows with `prompt`, `entry_point` and `test`. Errors as `read_prompt_tasks`."""
    found: list[Task] = []
    for number, row in read_jsonl(path):
        prompt, entry, test = (
            _text(path, number, row, key, "HumanEval") for key in ("prompt", "entry_point", "test")
        )
        found.append(HumanEvalTask(f"humaneval/{number}", "humaneval", prompt, entry, test, runner))
    return list(_spread(_some(found, path), limit))


def read_mbpp(path: Path, limit: int | None, runner: Runner) -> list[Task]:
    """Rows with `text` and `test_list`. Errors as `read_prompt_tasks`."""
    found: list[Task] = []
    for number, row in read_jsonl(path):
        text, tests = _text(path, number, row, "text", "MBPP"), row.get("test_list")
        if not isinstance(tests, list) or not tests or not all(isinstance(test, str) for test in tests):
            raise MTPError(f"{path}, line {number}: MBPP rows need `test_list`, a list of assertions")
        setup = str(row.get("test_setup_code") or "")
        found.append(MBPPTask(f"mbpp/{number}", "mbpp", text, setup, tuple(tests), runner))
    return list(_spread(_some(found, path), limit))


def _text(path: Path, number: int, row: dict[str, Any], key: str, kind: str) -> str:
    value = row.get(key)
    if not isinstance(value, str) or not value.strip():
        raise MTPError(f"{path}, line {number}: {kind} rows need `{key}`, a text")
    return value


def _some(found: list[Item], path: Path) -> list[Item]:
    if not found:
        raise MTPError(f"{path}: no question. Write one JSON object per line.")
    return found


def _spread(found: Sequence[Item], limit: int | None) -> Sequence[Item]:
    """At most `limit`, evenly over the file."""
    if limit is None or limit >= len(found):
        return found
    return [found[index * len(found) // limit] for index in range(limit)]
