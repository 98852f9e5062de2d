"""Texts in the contents of messages and of tools' results, which clients write in many ways."""

from __future__ import annotations

import json
from typing import Any

from mtp_mlx.serve.fields import Fields, checked_text
from mtp_mlx.serve.request import RequestError

# Parts that are text: type -> the field that holds it. The APIs' own types are taken in all of them, since agents
# carry conversations from one to the other.
TEXTS = {"text": "text", "input_text": "text", "output_text": "text", "refusal": "refusal"}
THOUGHTS = {"thinking": "thinking", "reasoning": "text", "reasoning_text": "text", "summary_text": "text"}


def message_text(content: Any, name: str, kinds: dict[str, str] = TEXTS) -> str:
    """The text of a message's content: a string, or a list of texts and of parts that are text.

    Raises:
        RequestError: if it is or has anything else.
    """
    if isinstance(content, str):
        return checked_text(content, name)
    if not isinstance(content, list):
        raise RequestError(f"{name} must be a string or a list of parts", field=name)
    texts = []
    for part in content:
        kind = kind_of(part)
        if kind not in kinds:
            raise RequestError(f"{name}: only parts of type text are supported, not {kind!r}", field=name)
        texts.append(checked_text(part if isinstance(part, str) else part.get(kinds[kind]), name))
    return "".join(texts)


def kind_of(part: Any) -> Any:
    """The type of a part, "text" for a string; None if it has none."""
    if isinstance(part, str):
        return "text"
    kind = part.get("type") if isinstance(part, dict) else None
    return kind if isinstance(kind, str) else None


def told_apart(content: Any, name: str) -> tuple[str, str]:
    """(text, thinking) of an assistant's content, in which some clients leave its thinking.

    Raises:
        RequestError: as `message_text`.
    """
    if not isinstance(content, list):
        return message_text(content, name), ""
    thoughts = [part for part in content if kind_of(part) in THOUGHTS]
    texts = [part for part in content if kind_of(part) not in THOUGHTS]
    return message_text(texts, name), message_text(thoughts, name, THOUGHTS)


def result_text(content: Any, name: str, fields: Fields) -> str:
    """The text of a tool's result, which the client may not be able to change: nothing in it is refused.

    A list of parts is joined; a part that is no text is replaced by words that say so, and counted among the ignored
    fields. Other JSON values are written as JSON.

    Args:
        content: as the request has it; None for an empty result.
        fields: of the request.
    """
    if content is None:
        return ""
    if isinstance(content, str):
        return checked_text(content, name)
    if not isinstance(content, list) or not all(kind_of(part) for part in content):
        return checked_text(json.dumps(content, ensure_ascii=False), name)
    return "".join(_part_text(part, name, fields) for part in content)


def _part_text(part: Any, name: str, fields: Fields) -> str:
    kind = kind_of(part)
    if kind in TEXTS:
        return message_text([part], name)
    written = document_text(part, name)
    if written is not None:
        return written
    fields.ignore(f"tool result of type {checked_text(kind, name)}")
    return f"[{kind} left out: this model reads text only]"


def document_text(part: dict[str, Any], name: str) -> str | None:
    """The text of one of Anthropic's documents or search results; None if it is something else, or holds no text."""
    kind, source = part.get("type"), part.get("source")
    if kind == "document" and isinstance(source, dict):
        if source.get("type") == "text":
            text = checked_text(source.get("data"), f"{name}.source.data")
        elif source.get("type") == "content":
            text = message_text(source.get("content"), f"{name}.source.content")
        else:
            return None
    elif kind == "search_result":
        text = message_text(part.get("content"), f"{name}.content")
    else:
        return None
    title = part.get("title")
    return f"{checked_text(title, f'{name}.title')}\n{text}" if title else text
