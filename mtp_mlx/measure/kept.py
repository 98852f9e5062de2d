"""Measurements kept line by line in a file, so that a stopped run can resume."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Generic, TypeVar

from mtp_mlx.errors import MTPError
from mtp_mlx.files import clear_errors, write_text

Row = TypeVar("Row")


class KeptRows(Generic[Row]):
    """A JSONL file of measurements, each a flat dataclass.

    Args:
        path: the file, or None to keep nothing.
        row: the dataclass.
        key: fingerprint of everything that a measurement depends on.
        kind: of run, for messages: "a tau sweep".
    """

    def __init__(self, path: Path | None, row: Callable[..., Row], key: str, kind: str) -> None:
        self._path, self._row, self._key, self._kind = path, row, key, kind

    def read(self) -> Iterator[Row]:
        """The measurements of an earlier run. If its last line was cut off, that line is removed from the file.

        Raises:
            MTPError: not UTF-8, a line that is no measurement, or one of another run. The file stays as it is.
        """
        if self._path is None or not self._path.exists():
            return
        try:
            text = self._path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise MTPError(
                f"{self._path} is not UTF-8, so it holds no measurements of {self._kind}; give another `out`"
            ) from error
        lines = text.splitlines(keepends=True)
        if lines and self._is_cut(lines[-1]):
            lines.pop()
        for number, line in enumerate(lines, start=1):
            try:
                values = json.loads(line)
                key, measured = values.pop("key"), self._row(**values)
            except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
                raise MTPError(
                    f"{self._path}, line {number}: no measurement of {self._kind}; give another `out`"
                ) from error
            if key != self._key:
                raise MTPError(
                    f"{self._path} holds {self._kind} of another model, adapter, questions or settings: "
                    "give another `out`"
                )
            yield measured
        whole = "".join(line.rstrip("\n") + "\n" for line in lines)
        if whole != text:
            write_text(self._path, whole)

    def _is_cut(self, line: str) -> bool:
        """Whether the last line is the beginning of one that `keep` was writing when the run was stopped."""
        if line.endswith("\n"):
            return False
        begins = json.dumps({"key": self._key})[:-1]
        if not (line.startswith(begins) or begins.startswith(line)):
            return False
        try:
            json.loads(line)
        except (ValueError, RecursionError):
            return True
        return False

    def keep(self, row: Row) -> None:
        """Appends one measurement. Raises MTPError if the file cannot be written."""
        if self._path is None:
            return
        values: dict[str, Any] = dict(vars(row))
        with clear_errors(self._path):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with open(self._path, "a", encoding="utf-8") as file:
                file.write(json.dumps({"key": self._key, **values}) + "\n")
