"""Messages of OpenAI's chat API -> messages as chat templates read them: arguments of tool calls are objects."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from mtp_mlx.serve.contents import message_text, result_text, told_apart
from mtp_mlx.serve.fields import Fields, checked_text
from mtp_mlx.serve.request import RequestError

MOST_MESSAGES = 4096
ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "assistant": "assistant",
    "tool": "tool",
}

Turn = dict[str, Any]


def message_list(messages: Any, name: str = "messages") -> list[dict[str, Any]]:
    """The messages of a request.

    Raises:
        RequestError: if they are no list of objects, or too many.
    """
    if not isinstance(messages, list) or not 1 <= len(messages) <= MOST_MESSAGES:
        raise RequestError(f"{name} must be a list of 1 to {MOST_MESSAGES} messages", field=name)
    for i, message in enumerate(messages):
        if not isinstance(message, dict):
            raise RequestError(f"{name}[{i}] must be an object with role and content", field=name)
    return messages


def chat_turns(messages: Any, fields: Fields) -> list[Turn]:
    """The turns of a conversation.

    Args:
        messages: of the request.
        fields: of the request, which count what of the messages has no effect.

    Raises:
        RequestError: if a message is not as OpenAI's chat API describes it, or holds anything but text.
    """
    turns: list[Turn] = []
    names: dict[str, str] = {}  # of the tools called so far, by the call's id
    for i, message in enumerate(message_list(messages)):
        turn = _turn(message, f"messages[{i}]", names, fields)
        for call in turn.get("tool_calls", []):
            names[call["id"]] = call["function"]["name"]
        turns.append(turn)
    return turns


def _turn(message: dict[str, Any], where: str, names: dict[str, str], fields: Fields) -> Turn:
    role = message.get("role")
    if not isinstance(role, str) or role not in ROLES:
        raise RequestError(f"{where}: role must be one of {', '.join(ROLES)}, not {role!r}", field="messages")
    for name in ("function_call", "audio"):
        if message.get(name):
            raise RequestError(f"{where}: {name} is not supported", field="messages")
    content = message.get("content")
    if content is None and role == "assistant":  # it only called tools, or was cut while it thought
        content = ""
    turn: Turn = {"role": ROLES[role]}
    if role == "tool":
        turn["content"] = result_text(content, f"{where}.content", fields)
    elif role != "assistant":
        turn["content"] = message_text(content, f"{where}.content")
    else:
        turn["content"], inside = told_apart(content, f"{where}.content")
        thinking = message.get("reasoning_content") or message.get("reasoning") or inside
        if thinking:
            turn["reasoning_content"] = checked_text(thinking, f"{where}.reasoning_content")
        if calls := message.get("tool_calls"):
            turn["tool_calls"] = _calls(calls, where)
    if role != "assistant" and message.get("tool_calls"):
        raise RequestError(f"{where}: only an assistant's message has tool_calls", field="messages")
    if role == "tool":
        turn |= result_of(message.get("tool_call_id"), message.get("name"), names, where)
    return turn


def result_of(call: Any, name: Any, names: dict[str, str], where: str) -> Turn:
    """What a tool's result says about its call: the call's id, and the tool's name if it is known.

    Args:
        call: id of the call, or None.
        name: of the tool, if the message says so.
        names: the tools called so far, by the call's id.
    """
    found: Turn = {}
    if call is not None:
        found["tool_call_id"] = checked_text(call, f"{where}.tool_call_id")
    name = names.get(found.get("tool_call_id", "")) if name is None else name
    if name is not None:
        found["name"] = checked_text(name, f"{where}.name")
    return found


def _calls(calls: Any, where: str) -> list[Turn]:
    if not isinstance(calls, list):
        raise RequestError(f"{where}.tool_calls must be a list", field="messages")
    return [_call(call, f"{where}.tool_calls[{i}]") for i, call in enumerate(calls)]


def _call(call: Any, where: str) -> Turn:
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict):
        raise RequestError(
            f"{where} must be an object with id and function; other types are not supported", field="messages"
        )
    arguments = function.get("arguments")
    return call_turn(call.get("id"), function.get("name"), arguments, where)


def call_turn(call_id: Any, name: Any, arguments: Any, where: str) -> Turn:
    """A tool call as chat templates read it.

    Args:
        arguments: JSON text, an object, or None for no arguments.

    Raises:
        RequestError: if the arguments are no JSON object, or the name is no text.
    """
    if not checked_text(name, f"{where}: the tool's name"):
        raise RequestError(f"{where}: the tool's name is empty", field="messages")
    if isinstance(arguments, str) and arguments.strip():
        try:
            arguments = json.loads(arguments)
        except (ValueError, RecursionError):
            raise RequestError(f"{where}: the arguments are not JSON", field="messages") from None
    arguments = arguments or {}
    if not isinstance(arguments, dict):
        raise RequestError(f"{where}: the arguments must be a JSON object", field="messages")
    identity = "" if call_id is None else checked_text(call_id, f"{where}.id")
    return {"id": identity, "type": "function", "function": {"name": name, "arguments": arguments}}


ONE_SYSTEM_MESSAGE = (
    "the chat template takes one system message only, so all of them were joined at the beginning"
)


def variants(turns: list[Turn]) -> Iterator[tuple[list[Turn], list[str]]]:
    """A conversation as it is, and then in forms that a template may take which rejects this one.

    Yields:
        (turns, notes on what was changed in the conversation).
    """
    calls = any(turn.get("tool_calls") for turn in turns)
    yield turns, []
    if calls:
        yield [_with_json(turn) for turn in turns], []
    system = [turn["content"] for turn in turns if turn["role"] == "system"]
    if not system or (len(system) == 1 and turns[0]["role"] == "system"):
        return
    rest = [turn for turn in turns if turn["role"] != "system"]
    joined = [{"role": "system", "content": "\n\n".join(system)}, *rest]
    yield joined, [ONE_SYSTEM_MESSAGE]
    if calls:
        yield [_with_json(turn) for turn in joined], [ONE_SYSTEM_MESSAGE]


def _with_json(turn: Turn) -> Turn:
    """A turn whose tool calls have their arguments as JSON text."""
    if not turn.get("tool_calls"):
        return turn
    calls = []
    for call in turn["tool_calls"]:
        arguments = json.dumps(call["function"]["arguments"], ensure_ascii=False)
        calls.append({**call, "function": {**call["function"], "arguments": arguments}})
    return {**turn, "tool_calls": calls}
