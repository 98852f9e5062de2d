"""Messages and tools of Anthropic's API -> those that chat templates read, which have OpenAI's form."""

from __future__ import annotations

from typing import Any

from mtp_mlx.serve.contents import document_text, kind_of, message_text, result_text
from mtp_mlx.serve.fields import Fields, checked_text
from mtp_mlx.serve.request import RequestError
from mtp_mlx.serve.tools import ToolUse, checked_tool, chosen, tool_list
from mtp_mlx.serve.turns import Turn, call_turn, message_list, result_of

ROLES = ("user", "assistant", "system")
ELSEWHERE = frozenset(("server_tool_use", "mcp_tool_use"))  # of tools that run on Anthropic's servers
CHOICES = {"auto": "auto", "none": "none", "any": "required", "tool": "named"}


def message_turns(messages: Any, system: Any, fields: Fields) -> list[Turn]:
    """The turns of a conversation. A user's message with results of tools becomes a turn for each of them.

    Args:
        messages, system: of the request.
        fields: of the request, which count what of the messages has no effect.

    Raises:
        RequestError: if a message is not as Anthropic's API describes it, or holds anything but text.
    """
    turns: list[Turn] = []
    if system is not None:
        turns.append({"role": "system", "content": message_text(system, "system")})
    names: dict[str, str] = {}  # of the tools called so far, by the call's id
    for i, message in enumerate(message_list(messages)):
        where, role = f"messages[{i}]", message.get("role")
        if role not in ROLES:
            raise RequestError(
                f"{where}: role must be one of {', '.join(ROLES)}, not {role!r}", field="messages"
            )
        content = message.get("content")
        if not isinstance(content, list):
            turns.append({"role": role, "content": message_text(content, f"{where}.content")})
        elif role == "assistant":
            turns.append(_said(content, f"{where}.content", names, fields))
        else:
            turns += _asked(role, content, f"{where}.content", names, fields)
    return turns


def _said(content: list[Any], where: str, names: dict[str, str], fields: Fields) -> Turn:
    """An assistant's message: text, thinking and tool calls."""
    texts, thoughts, calls = [], [], []
    for i, block in enumerate(content):
        kind, at = kind_of(block), f"{where}[{i}]"
        if kind == "text":
            texts.append(message_text([block], f"{at}.text"))
        elif kind == "thinking":
            thoughts.append(checked_text(block.get("thinking"), f"{at}.thinking"))
        elif kind == "tool_use":
            call = call_turn(block.get("id"), block.get("name"), block.get("input"), at)
            names[call["id"]] = call["function"]["name"]
            calls.append(call)
        elif isinstance(kind, str) and (kind in ELSEWHERE or kind.endswith("_tool_result")):
            fields.ignore(f"messages.{checked_text(kind, at)}")
        elif kind != "redacted_thinking":  # nobody here could read it
            raise RequestError(f"{at}: blocks of type {kind!r} are not supported", field="messages")
    turn: Turn = {"role": "assistant", "content": "".join(texts)}
    if thoughts:
        turn["reasoning_content"] = "\n".join(thoughts)
    if calls:
        turn["tool_calls"] = calls
    return turn


def _asked(role: str, content: list[Any], where: str, names: dict[str, str], fields: Fields) -> list[Turn]:
    """A user's message: results of tools and text, in their order."""
    turns: list[Turn] = []
    for i, block in enumerate(content):
        kind, at = kind_of(block), f"{where}[{i}]"
        written = None if kind == "text" or kind is None else document_text(block, at)
        if kind == "text" or written is not None:
            text = message_text([block], f"{at}.text") if written is None else f"{written}\n"
            if turns and turns[-1]["role"] == role:
                turns[-1]["content"] += text
            else:
                turns.append({"role": role, "content": text})
        elif kind == "tool_result" and role == "user":
            turns.append(_result(block, at, names, fields))
        else:
            raise RequestError(f"{at}: blocks of type {kind!r} are not supported", field="messages")
    return turns or [{"role": role, "content": ""}]


def _result(block: dict[str, Any], where: str, names: dict[str, str], fields: Fields) -> Turn:
    text = result_text(block.get("content"), f"{where}.content", fields)
    if block.get("is_error") is True:  # chat templates know no other way to say so
        text = f"Error: {text}"
    return {"role": "tool", "content": text, **result_of(block.get("tool_use_id"), None, names, where)}


def tool_use(fields: Fields) -> ToolUse:
    """Take tools and tool_choice. Tools that only Anthropic's servers or models know are left out, and counted.

    Raises:
        RequestError: if one of them is invalid.
    """
    tools = []
    for i, tool in enumerate(tool_list(fields.take("tools"))):
        kind = tool.get("type", "custom")
        if kind not in ("custom", None):
            fields.ignore(f"tools.{checked_text(kind, f'tools[{i}].type')}")
            continue
        tools.append(
            checked_tool(tool.get("name"), tool.get("description"), tool.get("input_schema"), f"tools[{i}]")
        )
    choice = fields.take("tool_choice", {"type": "auto"})
    kind = choice.get("type") if isinstance(choice, dict) else None
    if not isinstance(kind, str) or kind not in CHOICES:
        raise RequestError(
            f"tool_choice must be an object whose type is one of {', '.join(CHOICES)}", field="tool_choice"
        )
    single = choice.get("disable_parallel_tool_use") or False
    if not isinstance(single, bool):
        raise RequestError("tool_choice.disable_parallel_tool_use must be true or false", field="tool_choice")
    name = checked_text(choice.get("name"), "tool_choice.name") if kind == "tool" else None
    return chosen(tools, CHOICES[kind], name, not single)
