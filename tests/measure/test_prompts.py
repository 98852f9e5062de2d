"""Proves that every form of row is read as one kind of prompt, limited evenly, and refused with its line."""

from __future__ import annotations

import json
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest

from mtp_mlx.errors import MTPError
from mtp_mlx.measure.prompts import BUILT_IN, last_number, read_gsm8k, read_prompts, read_questions
from tests.measure.test_code_tasks import HUMANEVAL, MBPP, PROMPT


def write(path: Path, *rows: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_rows_become_prompts(tmp_path: Path) -> None:
    rows = [{"prompt": "a", "category": "x"}, {"turns": ["b", "c"]}, {"question": "d", "answer": "Paris"}]
    path = write(tmp_path / "p.jsonl", *rows)
    found = read_prompts(path)
    assert [(one.text, one.category, one.name) for one in found] == [
        ("a", "x", "p/1"),
        ("b", "all", "p/2"),
        ("d", "all", "p/3"),
    ]
    assert all(one.answer is None and one.raw == one.text for one in found)


def test_prompts_are_limited(tmp_path: Path) -> None:
    path = write(tmp_path / "p.jsonl", *({"prompt": name, "category": name[0]} for name in ("x1", "y", "x2")))
    assert [one.text for one in read_prompts(path, None, 1)] == ["x1", "y"]
    assert [one.text for one in read_prompts(path, 2)] == ["x1", "y"]
    assert len(BUILT_IN) >= 6 and len({one.name for one in BUILT_IN}) == len(BUILT_IN)
    assert read_prompts(None, 2) == [BUILT_IN[0], BUILT_IN[len(BUILT_IN) // 2]], "spread over the file"
    assert read_prompts(None, 100) == read_questions(None) == list(BUILT_IN)


def test_answers_of_questions(tmp_path: Path) -> None:
    rows = [
        {"question": "How many?", "answer": "16 - 3 = <<16-3=13>>13\n#### 1,300"},
        {"prompt": "Why?", "category": "x"},
        {"turns": ["Hello", "Bye"], "answer": 4},
    ]
    path = write(tmp_path / "q.jsonl", *rows)
    first, second, third = read_questions(path)
    assert first.is_right("That makes 1300.") is True and first.is_right("That makes 13.") is False
    assert second.is_right("4") is None and third.is_right("it is 4.0") is True
    assert [one.category for one in (first, second, third)] == ["q", "x", "q"]
    assert [one.text for one in read_questions(path, 2)] == ["How many?", "Why?"]
    (gsm8k,) = read_gsm8k(write(tmp_path / "g.jsonl", {**rows[0], "category": "y"}))
    assert gsm8k.category == "gsm8k" and gsm8k.answer == Decimal(1300)


def test_rows_of_humaneval_and_mbpp(tmp_path: Path) -> None:
    path = write(tmp_path / "code.jsonl", HUMANEVAL, MBPP, {**MBPP, "task_id": "Mbpp/12", "answer": "none"})
    for found in (read_prompts(path), read_questions(path)):
        assert [one.name for one in found] == ["HumanEval/0", "Mbpp/11", "Mbpp/12"]
        assert all(one.code is not None and one.answer is None for one in found)
        assert found[0].raw == PROMPT and PROMPT.rstrip() in found[0].text != found[0].raw
    assert {one.category for one in read_questions(path)} == {"code"}


def test_names_are_those_of_the_rows(tmp_path: Path) -> None:
    path = write(tmp_path / "p.jsonl", {"prompt": "a", "task_id": "own"}, {"prompt": "b", "task_id": 7})
    assert [one.name for one in read_prompts(path)] == ["own", "7"]


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("so it is 1,234.50 dollars.", "1234.50"),
        ("3 + 4 = 7.", "7"),
        ("-12", "-12"),
        ("no number", None),
        ("it costs $.75", ".75"),
        ("#### 18", "18"),
    ],
)
def test_last_number(text: str, number: str | None) -> None:
    assert last_number(text) == (None if number is None else Decimal(number))


@pytest.mark.parametrize(
    ("reader", "row", "message"),
    [
        (read_prompts, {"text": "a"}, "line 2: needs `question`, `prompt`"),
        (read_prompts, {"question": 1}, "line 2: needs `question`, `prompt`"),
        (read_prompts, {"prompt": "a", "task_id": 1.5}, "line 2: `task_id` must be a text or a whole number"),
        (read_prompts, {"prompt": "a", "task_id": ""}, "line 2: `task_id` must be a text or a whole number"),
        (read_questions, {"prompt": "a", "answer": "none"}, "line 2: `answer` has no number"),
        (read_questions, {"entry_point": "f"}, "line 2: HumanEval rows need `prompt`"),
        (read_gsm8k, {"question": "x"}, "line 2: GSM8K rows need `question` and `answer`"),
    ],
)
def test_bad_rows(tmp_path: Path, reader: Any, row: dict[str, Any], message: str) -> None:
    path = write(tmp_path / "rows.jsonl", {"question": "How many?", "answer": "3"}, row)
    with pytest.raises(MTPError, match=message):
        reader(path)
    path.write_text("\n")
    with pytest.raises(MTPError, match="no prompt"):
        reader(path)
