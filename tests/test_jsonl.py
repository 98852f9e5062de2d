"""Rows of JSON lines come with their line numbers, and a line that is none is one sentence with file and line."""

from __future__ import annotations

from pathlib import Path

import pytest

from mtp_mlx.errors import MTPError
from mtp_mlx.jsonl import read_jsonl

GOOD = b'{"text": "The sky"}\n'


def test_a_byte_order_mark_is_read_over(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + GOOD)
    assert list(read_jsonl(path)) == [(1, {"text": "The sky"})]


def test_blank_lines_count_and_are_left_out(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"\n" + GOOD + b"  \n" + b'{"a": 1}')
    assert list(read_jsonl(str(path))) == [(2, {"text": "The sky"}), (4, {"a": 1})]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"text": "The s', "truncated.*Delete this line"),
        (b'{"text": "The s\n', "invalid JSON at column"),
        (b'{"text": "\xff"}\n', "not UTF-8 at byte 10"),
        (b'{"text": "\\ud800"}\n', "half of a surrogate pair"),
        (b'{"text": ' + b"[" * 100_000 + b"\n", "cannot be read"),
        (b"[1]\n", "a JSON object is needed, this is a list"),
    ],
)
def test_errors_name_file_and_line(tmp_path: Path, line: bytes, message: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(GOOD + b"\n" + line)
    with pytest.raises(MTPError, match=f"rows.jsonl, line 3: .*{message}"):
        list(read_jsonl(path))
    with pytest.raises(MTPError, match=r"none\.jsonl: cannot be read"):
        list(read_jsonl(tmp_path / "none.jsonl"))
