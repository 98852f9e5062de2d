"""The prompts that `distill` reads, and the rows that it writes of their answers.

A row is the prompt as it was read, and the answer as `mtp_mlx.train.data` reads it. A thought whose end is missing is
not written: neither what follows it nor where it would have ended is known.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from mtp_mlx.answer_parts import ends_in_thought, told_apart
from mtp_mlx.chat_template import Thinking, thinking_options
from mtp_mlx.errors import MTPError
from mtp_mlx.files import clear_errors
from mtp_mlx.jsonl import read_jsonl
from mtp_mlx.token_ids import check_ids, text_of
from mtp_mlx.train.messages import messages_prompt_ids, prompt_ids, read_messages

COPIED_FIELDS = ("id", "category", "source", "licence", "license")


@dataclass(frozen=True)
class Prompt:
    """A prompt.

    Attributes:
        row: its fields, as they are written to the output.
        where: file and line.
        key: its id, or else its digest; unique in the output.
        digest: hash of its text.
    """

    row: dict[str, Any]
    where: str
    key: str
    digest: str


@dataclass(frozen=True)
class Answer:
    """An answer.

    Attributes:
        prompt: what was answered.
        ids: of the prompt.
        tokens: generated ids, without the eos.
        finished: whether the model ended it; false if it was truncated.
    """

    prompt: Prompt
    ids: list[int]
    tokens: list[int]
    finished: bool


@dataclass(frozen=True)
class Thoughts:
    """What a row has of the model's thinking.

    Attributes:
        asked: variables of the chat template for the prompt that the model answers.
        written: those for the prompt that is trained on; other ones where thoughts are dropped.
        kept: whether answers keep their thoughts.
    """

    asked: dict[str, Any]
    written: dict[str, Any]
    kept: bool = True


def thoughts_of(tokenizer: Any, thinking: Thinking, kept: bool) -> Thoughts:
    """What rows have of the model's thinking.

    Args:
        thinking: "on" or "off", through the template's own switch; "auto" leaves it to mlx-lm.
        kept: whether answers keep their thoughts. An answer that lost its own is trained on behind a prompt that
            turns thinking off, where the model would write an answer at once.

    Raises:
        MTPError: if thinking cannot be turned on or off as this needs.
    """
    asked = thinking_options(tokenizer, thinking)
    if kept:
        return Thoughts(asked, asked)
    try:
        return Thoughts(asked, thinking_options(tokenizer, "off"), kept=False)
    except MTPError as error:
        raise MTPError(
            "`thoughts` cannot be drop: an answer without its thought is trained on behind a prompt that turns "
            "thinking off, which this model's chat template does not offer"
        ) from error


# --- prompts and earlier answers ----------------------------------------------------------------------------


def read_prompts(path: Path, limit: int | None = None) -> Iterator[Prompt]:
    """The prompts of a JSONL file, whose rows have `prompt`, `messages` or `turns`.

    The first of `turns` is the prompt. Assistant messages at the end of `messages` are dropped: the model answers
    itself.

    Raises:
        MTPError: a row has no prompt; with file and line number.
    """
    for number, row in islice(read_jsonl(path), limit):
        where = f"{path}, line {number}"
        asked = _asked(row, where)
        digest = _digest(asked)
        key = str(row["id"]) if row.get("id") is not None else digest
        copied = {name: row[name] for name in COPIED_FIELDS if row.get(name) is not None}
        yield Prompt({**copied, **asked}, where, key, digest)


def _asked(row: dict[str, Any], where: str) -> dict[str, Any]:
    """{"prompt": text} or {"messages": [...]} (with "tools" if given) of a prompt row."""
    if "messages" in row:
        messages = row["messages"]
        if not isinstance(messages, list):
            raise MTPError(f'{where}: "messages" must be a list. Fix this row.')
        while messages and isinstance(messages[-1], dict) and messages[-1].get("role") == "assistant":
            messages = messages[:-1]
        if not messages:
            raise MTPError(f'{where}: "messages" has nothing to answer. Fix this row.')
        read_messages(messages, where)
        return {"messages": messages} | ({"tools": row["tools"]} if row.get("tools") else {})
    text = row.get("prompt")
    if text is None and isinstance(row.get("turns"), list) and row["turns"]:
        text = row["turns"][0]
    if not isinstance(text, str) or not text.strip():
        raise MTPError(f'{where}: no prompt. The row needs "prompt" (text), "messages" or "turns".')
    return {"prompt": text}


def _digest(asked: dict[str, Any]) -> str:
    """16 hex digits that depend on the prompt's text."""
    text = json.dumps(asked, sort_keys=True, ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def repair_last_line(path: Path) -> str:
    """Drops a last line that was cut off while it was written; returns what was done, in words, or ""."""
    if not path.exists():
        return ""
    with clear_errors(path), path.open("r+b") as file:
        content = file.read()
        if not content or content.endswith(b"\n"):
            return ""
        start = content.rfind(b"\n") + 1
        try:
            json.loads(content[start:])
        except ValueError:
            file.truncate(start)
            return f"{path}: dropped the last line, which was cut off while it was written"
        file.write(b"\n")
    return ""


def read_answered(path: Path) -> dict[str, str]:
    """{key: digest} of every prompt that is answered in the output.

    Raises:
        MTPError: the file does not hold answers.
    """
    answered: dict[str, str] = {}
    if not path.exists():
        return answered
    for number, row in read_jsonl(path):
        where = f"{path}, line {number}"
        if "response" not in row and "messages" not in row:
            raise MTPError(f'{where}: this file does not hold answers (no "response"). Choose another `out`.')
        digest = _digest(_asked(row, where))
        answered[str(row["id"]) if row.get("id") is not None else digest] = digest
    return answered


def encode_prompt(
    prompt: Prompt, tokenizer: Any, vocab_size: int | None = None, options: dict[str, Any] | None = None
) -> list[int]:
    """Ids of a prompt, as generation makes them.

    Args:
        options: further variables of the chat template.
        vocab_size: V, rows of the model's embedding; None: ids are not checked.

    Raises:
        MTPError: with file and line, if the row cannot be used.
    """
    row, where = prompt.row, prompt.where
    if "messages" in row:
        ids = messages_prompt_ids(tokenizer, row["messages"], row.get("tools"), where, options)
    else:
        try:
            ids = prompt_ids(tokenizer, row["prompt"], options=options)
        except MTPError as error:
            raise MTPError(f"{where}: {error}") from error
    if not ids:
        raise MTPError(f"{where}: the tokenizer makes no tokens of the prompt. Delete this row.")
    if vocab_size is not None:
        check_ids(ids, vocab_size, f"{where}: the prompt", tokenizer)
    return ids


def answer_row(
    answer: Answer, tokenizer: Any, temperature: float, thoughts: Thoughts
) -> dict[str, Any] | None:
    """The row of the output for an answer; None if its thought has no end, or nothing follows one that is dropped."""
    text, tokens = text_of(tokenizer, answer.tokens), answer.tokens
    if ends_in_thought(tokenizer, answer.ids, text):
        return None
    parts = told_apart(tokenizer, answer.ids, text)
    if not thoughts.kept:
        if parts.thinking or parts.text != text:
            text = parts.text
            tokens = [int(token) for token in tokenizer.encode(text, add_special_tokens=False)]
        if not tokens and not answer.finished:
            return None
    row = dict(answer.prompt.row)
    if "messages" in row:
        row["messages"] = [*row["messages"], _message(text, parts.text, parts.thinking, thoughts.kept)]
    else:
        row["response"] = text
    options = {"chat_template_kwargs": thoughts.written} if thoughts.written else {}
    return {
        **row,
        **options,
        "response_tokens": tokens,
        "finished": answer.finished,
        "temperature": temperature,
    }


def _message(text: str, answer: str, thinking: str, kept: bool) -> dict[str, Any]:
    """An assistant's message; a thought is its `reasoning_content`, as templates know it."""
    if not (kept and thinking):
        return {"role": "assistant", "content": text}
    return {"role": "assistant", "content": answer, "reasoning_content": thinking}
