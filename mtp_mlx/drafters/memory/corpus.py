"""Reads texts to remember: JSONL files of answers and chats, and plain text.

Of a row, what the model wrote is counted: the response of a prompt, every answer of a chat, all of a text. The end of
the prompt is context only, so that the first words of an answer are drafted, too.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from mtp_mlx.drafters.memory.ngrams import LONGEST, OTHERS
from mtp_mlx.errors import MTPError
from mtp_mlx.jsonl import read_jsonl
from mtp_mlx.token_ids import check_ids
from mtp_mlx.train.data import Encoder, Example

JSONL = (".jsonl", ".json")
LAST_ONLY = ("response_tokens", "finished")  # fields that speak of the last answer of a chat
CHARACTERS = 1 << 16  # of a plain text that are encoded at once


def examples_in(path: Path, tokenizer: Any) -> Iterator[Example]:
    """The texts of a file, each with the place from where it is counted.

    Raises:
        MTPError: if the file cannot be read, or a row has none of the known formats (with file and line number).
    """
    if path.suffix in JSONL:
        yield from _rows(path, Encoder(tokenizer, vocab_size=OTHERS))
    else:
        yield Example(_plain_text(path, tokenizer), 0)


def _rows(path: Path, encoder: Encoder) -> Iterator[Example]:
    for number, row in read_jsonl(path):
        where = f"{path}, line {number}"
        messages = row.get("messages")
        if not isinstance(messages, list):
            yield encoder.encode(row, where)
            continue
        answers = [
            place
            for place, message in enumerate(messages)
            if isinstance(message, dict) and message.get("role") == "assistant"
        ]
        earlier = {name: value for name, value in row.items() if name not in LAST_ONLY}
        for place in answers or [len(messages)]:  # without an answer, the encoder says what is missing
            fields = row if place == len(messages) - 1 else earlier
            yield encoder.encode({**fields, "messages": messages[: place + 1]}, where)


def _plain_text(path: Path, tokenizer: Any) -> list[int]:
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise MTPError(f"{path} is not UTF-8 at byte {error.start}: save it as UTF-8") from error
    except OSError as error:
        raise MTPError(f"{path}: cannot be read ({error.strerror}); check the path") from error
    if not text.strip():
        raise MTPError(f"{path} is empty: there is nothing to remember")
    ids: list[int] = []
    while text:
        cut = text.rfind("\n", 0, CHARACTERS) + 1 if len(text) > CHARACTERS else 0
        piece, text = text[: cut or CHARACTERS], text[cut or CHARACTERS :]
        ids += tokenizer.encode(piece, add_special_tokens=False)
    check_ids(ids, OTHERS, str(path), tokenizer)
    return ids


class Texts:
    """Texts one behind the other, as `ngrams.counted` takes them.

    Attributes:
        counted: tokens that are counted.
    """

    def __init__(self) -> None:
        self._tokens: list[int] = []
        self._reach: list[np.ndarray] = []
        self.counted = 0

    def add(self, tokens: list[int], start: int) -> None:
        """Appends a text that is counted from `tokens[start]` on; as much before that as contexts reach is used."""
        first = max(0, start - LONGEST)
        reach = np.minimum(np.arange(len(tokens) - first), LONGEST)
        reach[: start - first] = 0
        self._tokens += tokens[first:]
        self._reach.append(reach.astype(np.int8))
        self.counted += len(tokens) - start

    def __len__(self) -> int:
        return len(self._tokens)

    def arrays(self) -> tuple[np.ndarray, np.ndarray]:
        """(tokens [N] int64, reach [N] int8)."""
        reach = np.concatenate(self._reach) if self._reach else np.zeros(0, np.int8)
        return np.array(self._tokens, dtype=np.int64), reach
