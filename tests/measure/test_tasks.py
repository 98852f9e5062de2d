"""Proves that tasks are read and judged as their benchmarks say, and that code goes through the sandbox only."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mtp_mlx.errors import MTPError
from mtp_mlx.measure.sandbox import Outcome, Sandbox
from mtp_mlx.measure.tasks import code_of, read_gsm8k, read_humaneval, read_mbpp, read_prompt_tasks


class Recorder:
    """Keeps the programs, and says the same of all."""

    def __init__(self, passed: bool = True) -> None:
        self.programs: list[str] = []
        self._passed = passed

    def run(self, program: str) -> Outcome:
        self.programs.append(program)
        return Outcome(self._passed, "passed" if self._passed else "AssertionError", 0.0, ())


PROMPT = 'from typing import List\n\n\ndef double(x: List[int]) -> List[int]:\n    """ Twice.\n    """\n'
TEST = "def check(candidate):\n    assert candidate([1, 2]) == [2, 4]\n"
HUMANEVAL = {"task_id": "HumanEval/0", "prompt": PROMPT, "entry_point": "double", "test": TEST}
MBPP = {
    "text": "Write a function to add.",
    "test_setup_code": "one = 1",
    "test_list": ["assert add(one, 2) == 3", "assert add(0, 0) == 0"],
}
RIGHT = "    return [2 * y for y in x]\n"


def write(path: Path, *rows: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_humaneval_in_the_sandbox(tmp_path: Path) -> None:
    (task,) = read_humaneval(write(tmp_path / "h.jsonl", HUMANEVAL), None, Sandbox())
    whole = "def double(x: List[int]) -> List[int]:\n" + RIGHT
    assert task.judge(f"Here it is:\n```python\n{whole}```\nDone.").right is True, (
        "List comes from the prompt"
    )
    assert task.judge(f"```\n{RIGHT}```").right is True, "a body alone"
    wrong = task.judge("```python\ndef double(x): return x\n```")
    assert wrong.right is False and wrong.reason == "AssertionError"
    assert task.judge("I cannot.").reason == "SyntaxError"
    assert task.judge_raw(RIGHT + "\nprint(input())\ndef other(): pass").right is True, (
        "cut behind the function"
    )
    assert task.judge_raw("    return x\n").right is False
    assert PROMPT.rstrip() in task.message and task.raw == PROMPT and task.category == "humaneval"


def test_mbpp(tmp_path: Path) -> None:
    path = write(tmp_path / "m.jsonl", MBPP)
    (task,) = read_mbpp(path, None, Sandbox())
    assert task.judge("```python\r\ndef add(a, b):\r\n    return a + b\r\n```").right is True
    assert task.judge_raw("def add(a, b): return a * b").reason == "AssertionError"
    assert "assert add(one, 2) == 3" in task.message
    recorder = Recorder()
    (task,) = read_mbpp(path, None, recorder)
    task.judge("no code")
    assert recorder.programs == ["one = 1\nno code\nassert add(one, 2) == 3\nassert add(0, 0) == 0\n"]


def test_code_is_never_run_in_this_process(tmp_path: Path) -> None:
    """The recorder runs nothing: were the code executed anywhere else, this file would appear."""
    mark = tmp_path / "mark"
    (task,) = read_humaneval(write(tmp_path / "h.jsonl", HUMANEVAL), None, Recorder(False))
    assert task.judge(f"```python\nopen({str(mark)!r}, 'w')\n```").right is False and not mark.exists()


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


def test_gsm8k_and_prompts(tmp_path: Path) -> None:
    path = write(tmp_path / "g.jsonl", {"question": "How many?", "answer": "so\n#### 1,300"})
    (task,) = read_gsm8k(path, None)
    assert task.judge("It is 1300.").right is True and task.judge_raw("13").right is False
    prompts = [{"prompt": "a", "category": "x"}, {"turns": ["b", "c"]}, {"question": "d", "answer": 4}]
    found = read_prompt_tasks(write(tmp_path / "p.jsonl", *prompts), None)
    assert [(t.message, t.category) for t in found] == [("a", "x"), ("b", "p"), ("d", "p")]
    assert found[0].judge("5").right is None and found[2].judge("4").right is True
    assert [t.message for t in read_prompt_tasks(tmp_path / "p.jsonl", 2)] == ["a", "b"]
    built_in = read_prompt_tasks(None, 3)
    assert len(built_in) == 3 and len({task.name for task in built_in}) == 3


@pytest.mark.parametrize(
    ("reader", "row", "message"),
    [
        ("humaneval", {"prompt": "x", "test": "y"}, "line 1: HumanEval rows need `entry_point`"),
        ("mbpp", {"text": "x", "test_list": []}, "line 1: MBPP rows need `test_list`"),
        ("mbpp", {"test_list": ["x"]}, "line 1: MBPP rows need `text`"),
        ("gsm8k", {"question": "x"}, "line 1: GSM8K rows need `question` and `answer`"),
        ("prompts", {"text": "x"}, "line 1: needs `question`"),
    ],
)
def test_bad_rows(tmp_path: Path, reader: str, row: dict[str, Any], message: str) -> None:
    path = write(tmp_path / "rows.jsonl", row)
    readers = {
        "humaneval": lambda: read_humaneval(path, None, Recorder()),
        "mbpp": lambda: read_mbpp(path, None, Recorder()),
        "gsm8k": lambda: read_gsm8k(path, None),
        "prompts": lambda: read_prompt_tasks(path, None),
    }
    with pytest.raises(MTPError, match=message):
        readers[reader]()
    path.write_text("")
    with pytest.raises(MTPError, match="no question"):
        readers[reader]()
