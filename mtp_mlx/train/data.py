"""Training data: JSONL rows -> token ids, exactly as decoding would produce them.

An `Example` holds the prompt's ids as the chat template gives them (with its system prompt), then those of the
response, then the end-of-turn token, unless the answer was truncated.

Rows have these fields (the names are mlx-lm's, except `response`):

    {"messages": [..., {"role": "assistant", "content": ...}]}      a chat; the last message is the response
    {"prompt": ..., "completion": ...} or {"prompt": ..., "response": ...}
    {"text": ...}                                                   all of it is the response

    "weight"                optional; rows of weight 2 are seen twice as often as rows of weight 1
    "tools"                 optional; passed to the chat template
    "chat_template_kwargs"  optional; further variables of the chat template, such as enable_thinking
    "finished"              optional; false if the answer was truncated: no end-of-turn token is added
    "response_tokens"       optional; the ids that the model generated, instead of encoding the response's text

Rows whose answer ends within the model's thinking are left out: where the thought would have ended is not known.

The order in which a run sees its examples is in `mtp_mlx/train/order.py`.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from mtp_mlx.answer_parts import ends_in_thought
from mtp_mlx.errors import MTPError
from mtp_mlx.jsonl import read_jsonl, type_name
from mtp_mlx.token_ids import check_ids, text_of
from mtp_mlx.train.messages import (
    answer_text,
    end_of_turn_id,
    messages_prompt_ids,
    prompt_ids,
    read_messages,
    template_options,
)
from mtp_mlx.train.order import held_out_indices

DEFAULT_HELD_OUT = 32

ROW_FORMATS = '"messages", "prompt" with "completion" or "response", or "text"'


@dataclass(frozen=True)
class Example:
    """A training sequence.

    Attributes:
        tokens: ids of the prompt, then of the response.
        loss_start: index of the first response token; 0 if every token is one.
        weight: how often it is seen, relative to others.
    """

    tokens: list[int]
    loss_start: int
    weight: float = 1.0

    def __len__(self) -> int:
        return len(self.tokens)


@dataclass
class DataReport:
    """Counts of what was read, for the line printed before training.

    Attributes:
        rows: rows read.
        truncated: rows truncated to the maximum length, and used.
        dropped: rows left out because their prompt alone fills the maximum length.
        tokens: tokens of all examples.
        response_tokens: tokens of their responses.
        files: paths read.
        unended: rows left out because the thinking in their answer has no end.
    """

    rows: int = 0
    truncated: int = 0
    dropped: int = 0
    tokens: int = 0
    response_tokens: int = 0
    files: list[str] = field(default_factory=list)
    unended: int = 0

    def __add__(self, other: DataReport) -> DataReport:
        return DataReport(
            rows=self.rows + other.rows,
            truncated=self.truncated + other.truncated,
            dropped=self.dropped + other.dropped,
            tokens=self.tokens + other.tokens,
            response_tokens=self.response_tokens + other.response_tokens,
            files=self.files + other.files,
            unended=self.unended + other.unended,
        )

    def __str__(self) -> str:
        text = f"{self.rows:,} rows, {self.response_tokens:,} response tokens of {self.tokens:,}"
        if self.truncated:
            text += f"; {self.truncated:,} rows truncated"
        if self.dropped:
            text += f"; {self.dropped:,} rows dropped, whose prompt alone is too long"
        if self.unended:
            text += f"; {self.unended:,} rows dropped, whose thinking has no end"
        return text


@dataclass(frozen=True)
class Splits:
    """Training and held-out examples, and the report on both."""

    train: list[Example]
    held_out: list[Example]
    report: DataReport


# --- reading rows -------------------------------------------------------------------------------------------


def _typed(row: dict[str, Any], key: str, kind: type, where: str) -> Any:
    """`row[key]`; MTPError at `where` if it is not a `kind`."""
    value = row[key]
    if not isinstance(value, kind):
        raise MTPError(
            f'{where}: "{key}" must be a {type_name(kind())}, but its type is {type_name(value)}. Fix this row.'
        )
    return value


def _weight(row: dict[str, Any], where: str) -> float:
    value = row["weight"]
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
        raise MTPError(f'{where}: "weight" must be a positive number, not {value!r}. Fix this row.')
    return float(value)


# --- tokens -------------------------------------------------------------------------------------------------


class Encoder:
    """Encodes rows as `Example`s.

    Args:
        tokenizer: of the base model.
        cut_at_tokens: without "finished" in its row, a response of at least this many tokens counts as truncated
            (for files of tools that do not record it); None: as finished.
        vocab_size: V, rows of the model's embedding; None if the model is not at hand, so that ids are not checked.
    """

    def __init__(
        self, tokenizer: Any, *, cut_at_tokens: int | None = None, vocab_size: int | None = None
    ) -> None:
        self.tokenizer = tokenizer
        self.cut_at_tokens, self.vocab_size = cut_at_tokens, vocab_size
        self.end_of_turn = end_of_turn_id(tokenizer)

    def encode(self, row: dict[str, Any], where: str) -> Example:
        """The example of a row.

        Raises:
            MTPError: at `where`, if the row has none of the formats, or an id that the model has no row for.
        """
        example = self._example(row, where)
        if self.vocab_size is not None:
            made_by = None if "response_tokens" in row else self.tokenizer
            check_ids(example.tokens, self.vocab_size, f"{where}: the row", made_by)
        return replace(example, weight=_weight(row, where)) if "weight" in row else example

    def unended(self, example: Example) -> bool:
        """Whether the response ends within the model's thinking."""
        prompt, response = example.tokens[: example.loss_start], example.tokens[example.loss_start :]
        if not getattr(self.tokenizer, "has_thinking", False):
            return False
        return ends_in_thought(self.tokenizer, prompt, text_of(self.tokenizer, response))

    def _example(self, row: dict[str, Any], where: str) -> Example:
        finished = _typed(row, "finished", bool, where) if "finished" in row else None
        if "text" in row and "prompt" not in row and "messages" not in row:
            text = _typed(row, "text", str, where)
            if not text.strip():
                raise MTPError(f'{where}: "text" is empty. Delete this row.')
            return Example(self._ended(list(self.tokenizer.encode(text)), finished), 0)
        if "messages" in row:
            prompt, ids = self._chat(row, where)
        else:
            prompt, ids = self._pair(row, where)
        return Example(prompt + self._response_ids(row, ids, finished, where), len(prompt))

    def _pair(self, row: dict[str, Any], where: str) -> tuple[list[int], list[int]]:
        """Ids of a prompt and of its response."""
        reply = next((key for key in ("completion", "response") if key in row), None)
        if "prompt" not in row or reply is None:
            raise MTPError(
                f"{where}: no known format, the row has {sorted(row) or 'no fields'}. It needs {ROW_FORMATS}."
            )
        prompt, response = _typed(row, "prompt", str, where), _typed(row, reply, str, where)
        try:
            options = template_options(row, where)
            return prompt_ids(self.tokenizer, prompt, row.get("tools"), options), self._encoded(response)
        except MTPError as error:
            raise MTPError(f"{where}: {error}") from error

    def _chat(self, row: dict[str, Any], where: str) -> tuple[list[int], list[int]]:
        """Ids of all messages but the last, and of the last."""
        messages = read_messages(_typed(row, "messages", list, where), where)
        if len(messages) < 2 or messages[-1]["role"] != "assistant":
            raise MTPError(
                f"{where}: the last of \"messages\" must be the assistant's, after a user's. Fix this row."
            )
        tools, options = row.get("tools"), template_options(row, where)
        prompt = messages_prompt_ids(self.tokenizer, messages[:-1], tools, where, options)
        if not messages[-1].get("tool_calls"):
            return prompt, self._encoded(messages[-1]["content"])
        ids = self._encoded(answer_text(self.tokenizer, messages, tools, where, options))
        return prompt, ids[: ids.index(self.end_of_turn)] if self.end_of_turn in ids else ids

    def _encoded(self, response: str) -> list[int]:
        return list(self.tokenizer.encode(response, add_special_tokens=False)) if response.strip() else []

    def _response_ids(
        self, row: dict[str, Any], ids: list[int], finished: bool | None, where: str
    ) -> list[int]:
        if "response_tokens" in row:
            ids = _typed(row, "response_tokens", list, where)
            if not all(type(token) is int and token >= 0 for token in ids):
                raise MTPError(f'{where}: "response_tokens" must be a list of token ids. Fix this row.')
            if not ids and finished:  # the model answered with nothing
                return [self.end_of_turn]
        if not ids:
            raise MTPError(f"{where}: the response is empty. Delete this row.")
        if finished is None and self.cut_at_tokens is not None:
            finished = len(ids) < self.cut_at_tokens
        return self._ended(ids, finished)

    def _ended(self, ids: list[int], finished: bool | None) -> list[int]:
        return ids if finished is False or ids[-1] == self.end_of_turn else [*ids, self.end_of_turn]


def check_examples(examples: Iterable[Example], vocab_size: int | None) -> None:
    """Raises MTPError where an example, wherever it is from, has an id that the model has no row for."""
    if vocab_size is not None:
        for number, example in enumerate(examples, start=1):
            check_ids(example.tokens, vocab_size, f"example {number}")


# --- files --------------------------------------------------------------------------------------------------


def load_examples(
    path: str | Path,
    tokenizer: Any,
    max_length: int,
    *,
    cut_at_tokens: int | None = None,
    vocab_size: int | None = None,
) -> tuple[list[Example], DataReport]:
    """Examples of a JSONL file, or of `train.jsonl` in a folder, and the report on them.

    Args:
        path: of the file or folder.
        tokenizer: of the base model.
        max_length: longer rows are truncated to this many tokens. Rows whose prompt leaves no room for a response
            token are dropped.
        cut_at_tokens, vocab_size: see `Encoder`.

    Raises:
        MTPError: a row cannot be used (with file and line number), or no row is left.
    """
    path = Path(path)
    if path.is_dir():
        path = path / "train.jsonl"
    encoder = Encoder(tokenizer, cut_at_tokens=cut_at_tokens, vocab_size=vocab_size)
    examples, report = [], DataReport(files=[str(path)])
    for number, row in read_jsonl(path):
        example = encoder.encode(row, f"{path}, line {number}")
        report.rows += 1
        if encoder.unended(example):
            report.unended += 1
            continue
        if len(example) > max_length:
            if example.loss_start >= max_length:
                report.dropped += 1
                continue
            example = replace(example, tokens=example.tokens[:max_length])
            report.truncated += 1
        report.tokens += len(example)
        report.response_tokens += len(example) - example.loss_start
        examples.append(example)
    if report.rows == 0:
        raise MTPError(f"{path}: the file is empty. Write one JSON object per line, with {ROW_FORMATS}.")
    if not examples and report.unended:
        raise MTPError(
            f"{path}: no row can be used ({report.unended} of {report.rows} end within the model's thinking). Raise "
            "`max_tokens` of distill, or turn thinking off."
        )
    if not examples:
        raise MTPError(
            f"{path}: every prompt fills the {max_length} tokens of a sequence. Raise `max_length`."
        )
    return examples, report


def load_splits(
    path: str | Path,
    tokenizer: Any,
    max_length: int,
    *,
    held_out: int | None,
    seed: int,
    cut_at_tokens: int | None = None,
    vocab_size: int | None = None,
) -> Splits:
    """Training and held-out examples of a file, or of mlx-lm's kind of data folder.

    Args:
        path, tokenizer, max_length, cut_at_tokens, vocab_size: see `load_examples`.
        held_out: number of held-out examples: the first rows of `valid.jsonl` if the folder has one, else taken out
            of the training rows (see `split_held_out`). None: `DEFAULT_HELD_OUT`, but at most a tenth of the rows.
        seed: of the choice.

    Raises:
        MTPError: see `load_examples` and `split_held_out`.
    """
    path = Path(path)
    how = {"cut_at_tokens": cut_at_tokens, "vocab_size": vocab_size}
    train, report = load_examples(path, tokenizer, max_length, **how)
    valid_file = path / "valid.jsonl"
    if path.is_dir() and valid_file.exists():
        valid, valid_report = load_examples(valid_file, tokenizer, max_length, **how)
        return Splits(
            train, valid[: DEFAULT_HELD_OUT if held_out is None else held_out], report + valid_report
        )
    if held_out is None:
        held_out = min(DEFAULT_HELD_OUT, len(train) // 10)
    train, valid = split_held_out(train, held_out, seed)
    return Splits(train, valid, report)


def split_held_out(examples: Sequence[Example], n: int, seed: int) -> tuple[list[Example], list[Example]]:
    """(training examples, n held-out examples), both in the order of `examples`.

    Which ones are held out depends on the number of examples and the seed only.

    Raises:
        MTPError: no training example would be left.
    """
    if not 0 <= n < len(examples):
        raise MTPError(
            f"`held_out` is {n}, and the data has {len(examples)} rows. Hold out fewer, or add rows."
        )
    held_out = held_out_indices(len(examples), n, seed)
    train = [example for index, example in enumerate(examples) if index not in held_out]
    return train, [examples[index] for index in sorted(held_out)]


def fingerprint(examples: Iterable[Example]) -> str:
    """16 hex digits that change with any token, `loss_start` or weight, to check the data of a resumed run."""
    digest = hashlib.sha256()
    for example in examples:
        digest.update(np.asarray([len(example), example.loss_start, *example.tokens], dtype="<i8").tobytes())
        if example.weight != 1:
            digest.update(np.asarray([example.weight], dtype="<f8").tobytes())
    return digest.hexdigest()[:16]
