"""Files of JSON lines: one object a line, read row by row, with file and line number in every error."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mtp_mlx.errors import MTPError


def read_jsonl(path: str | Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield (line number from 1, row) of a JSONL file; blank lines are skipped.

    Raises MTPError with file and line number for a missing file, text that is not UTF-8, invalid or truncated
    JSON, text that is no Unicode, and a row that is not an object.
    """
    path = Path(path)
    try:
        file = path.open("rb")
    except OSError as error:
        raise MTPError(f"{path}: cannot be read ({error.strerror}). Check the path.") from error
    with file:
        for number, line in enumerate(file, start=1):
            row = _parse_line(line, path, number)
            if row is not None:
                yield number, row


def _parse_line(line: bytes, path: Path, number: int) -> dict[str, Any] | None:
    where = f"{path}, line {number}"
    try:
        text = line.decode("utf-8-sig" if number == 1 else "utf-8")
    except UnicodeDecodeError as error:
        raise MTPError(f"{where}: not UTF-8 at byte {error.start}. Save the file as UTF-8.") from error
    if not text.strip():
        return None
    try:
        row = json.loads(text)
    except json.JSONDecodeError as error:
        if not text.endswith("\n"):
            raise MTPError(
                f"{where}: truncated, the last line ends in the middle of its JSON. "
                "Delete this line or write the file again."
            ) from error
        raise MTPError(
            f"{where}: invalid JSON at column {error.colno} ({error.msg}). Each line must be one JSON object."
        ) from error
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, or nested as deeply
        raise MTPError(f"{where}: JSON that cannot be read ({error}). Fix this row.") from error
    if "\\u" in text:  # JSON can spell half of a character
        try:
            json.dumps(row, ensure_ascii=False).encode("utf-8")
        except UnicodeEncodeError as error:
            raise MTPError(
                f"{where}: a text has half of a surrogate pair (\\ud800 to \\udfff). Fix this row."
            ) from error
    if not isinstance(row, dict):
        raise MTPError(
            f"{where}: a JSON object is needed, this is a {type_name(row)}. Write one {{...}} per line."
        )
    return row


def type_name(value: Any) -> str:
    """What JSON calls the type of a value."""
    names = {dict: "object", list: "list", str: "string", bool: "boolean", int: "number", float: "number"}
    return "null" if value is None else names.get(type(value), type(value).__name__)
