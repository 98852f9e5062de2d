"""Chats from files -> token ids: messages as people have them are read, and what cannot be trained on is refused.

`content` may be a text, a list of parts of type "text", or null beside `tool_calls`. The `arguments` of a call may be
JSON in a text, as in OpenAI's files; templates get them as an object.
"""

from __future__ import annotations

import json
from typing import Any

from mtp_mlx.chat_template import chat_ids, chat_text
from mtp_mlx.errors import MTPError
from mtp_mlx.jsonl import type_name

Message = dict[str, Any]


# --- messages -------------------------------------------------------------------------------------------------


def read_messages(messages: list[Any], where: str) -> list[Message]:
    """The messages of a row as chat templates take them: every `content` is a text.

    Raises:
        MTPError: at `where`, if they are not a chat.
    """
    return [_message(message, f'{where}: "messages"[{index}]') for index, message in enumerate(messages)]


def _message(message: Any, where: str) -> Message:
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        raise MTPError(f'{where} must be an object with a "role". Fix this row.')
    calls = message.get("tool_calls")
    if calls is not None and not (isinstance(calls, list) and all(isinstance(call, dict) for call in calls)):
        raise MTPError(f'{where}: "tool_calls" must be a list of objects. Fix this row.')
    read = {**message, "content": _text(message.get("content"), bool(calls), where)}
    return {**read, "tool_calls": [_call(call) for call in calls]} if calls else read


def _text(content: Any, calls: bool, where: str) -> str:
    """The text of a message's content."""
    if isinstance(content, str):
        return content
    if content is None and calls:
        return ""
    if content is None:
        raise MTPError(f'{where} has no "content". Fix this row.')
    if not isinstance(content, list):
        raise MTPError(
            f'{where}: "content" must be a string, but its type is {type_name(content)}. Fix this row.'
        )
    for part in content:
        if not (isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str)):
            kind = part.get("type") if isinstance(part, dict) else type_name(part)
            raise MTPError(
                f'{where}: "content" has a part of type {kind!r}, and only text can be trained on. Delete this row.'
            )
    return "".join(part["text"] for part in content)


def _call(call: Message) -> Message:
    """A tool call whose arguments are an object."""
    function = call.get("function")
    if not isinstance(function, dict) or not isinstance(function.get("arguments"), str):
        return call
    try:
        arguments = json.loads(function["arguments"])
    except (ValueError, RecursionError):  # what the model wrote was no JSON
        return call
    return {**call, "function": {**function, "arguments": arguments}}


# --- ids ------------------------------------------------------------------------------------------------------


def template_options(row: dict[str, Any], where: str) -> dict[str, Any] | None:
    """The variables of the chat template that a row sets in "chat_template_kwargs", or None.

    Raises:
        MTPError: at `where`, if they are no object.
    """
    options = row.get("chat_template_kwargs")
    if options is not None and not isinstance(options, dict):
        raise MTPError(
            f'{where}: "chat_template_kwargs" must be an object, but its type is {type_name(options)}. Fix this row.'
        )
    return options


def prompt_ids(tokenizer: Any, prompt: str, tools: Any = None, options: Message | None = None) -> list[int]:
    """Ids of a user's prompt, through the chat template if there is one.

    Args:
        options: further variables of the template.

    Raises:
        MTPError: if the template does not take it.
    """
    if getattr(tokenizer, "has_chat_template", False):
        return chat_ids(tokenizer, [{"role": "user", "content": prompt}], tools, options)
    return list(tokenizer.encode(prompt))


def messages_prompt_ids(
    tokenizer: Any, messages: list[Any], tools: Any, where: str, options: Message | None = None
) -> list[int]:
    """Ids of messages from a file, up to where the answer begins.

    Args:
        options: further variables of the template.

    Raises:
        MTPError: at `where`, if the messages are not a chat or there is no chat template that takes them.
    """
    read = read_messages(messages, where)
    if not getattr(tokenizer, "has_chat_template", False):
        raise MTPError(
            f'{where}: this model has no chat template, so "messages" cannot be used. Write rows with '
            '"prompt" and "completion", or "text".'
        )
    try:
        _check_calls(tokenizer, read, tools)
        return chat_ids(tokenizer, read, tools, options)
    except MTPError as error:
        raise MTPError(f"{where}: {error}") from error


def _check_calls(tokenizer: Any, messages: list[Message], tools: Any) -> None:
    """Refuses tool calls of which the template writes nothing: the model would never see them."""
    names = [_name(call) for message in messages for call in message.get("tool_calls") or []]
    if not names:
        return
    text = chat_text(tokenizer, messages, tools, answer_follows=False)
    lost = next((name for name in names if name not in text), None)
    if lost is not None:
        raise MTPError(f"the model's chat template writes nothing of the tool call {lost!r}")


def _name(call: Message) -> str:
    function = call.get("function")
    return str((function if isinstance(function, dict) else call).get("name", ""))


def answer_text(
    tokenizer: Any, messages: list[Message], tools: Any, where: str, options: Message | None = None
) -> str:
    """What the chat template makes of the last message, behind the prompt that those before it are.

    Args:
        messages: from `read_messages`.
        options: further variables of the template.

    Raises:
        MTPError: at `where`, if the template does not write the answer behind the prompt.
    """
    try:
        _check_calls(tokenizer, messages, tools)
        prompt = chat_text(tokenizer, messages[:-1], tools, options, answer_follows=True)
        whole = chat_text(tokenizer, messages, tools, options, answer_follows=False)
    except MTPError as error:
        raise MTPError(f"{where}: {error}") from error
    if not whole.startswith(prompt):
        raise MTPError(
            f"{where}: this model's chat template writes the prompt in another way where tool calls follow, so they "
            "cannot be trained on. Delete this row."
        )
    return whole[len(prompt) :]


def end_of_turn_id(tokenizer: Any) -> int:
    """The id that ends an answer: what the chat template puts behind one, else the tokenizer's eos.

    They differ in some families: gemma ends a turn with <end_of_turn>, and its eos is <eos>.

    Raises:
        MTPError: the tokenizer has neither.
    """
    eos_ids = set(getattr(tokenizer, "eos_token_ids", None) or {tokenizer.eos_token_id})
    if getattr(tokenizer, "has_chat_template", False):
        turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "MARKED ANSWER"}]
        try:
            text = chat_text(tokenizer, turns, answer_follows=False)
        except MTPError:  # the template refuses this chat
            text = ""
        tail = text.rpartition("MARKED ANSWER")[2]
        for token in tokenizer.encode(tail, add_special_tokens=False) if tail else []:
            if token in eos_ids:
                return int(token)
    if tokenizer.eos_token_id is None:
        raise MTPError("the tokenizer has no eos token. Set eos_token in its tokenizer_config.json.")
    return int(tokenizer.eos_token_id)
