"""Items and tools of OpenAI's responses API -> messages and tools as chat templates read them."""

from __future__ import annotations

from typing import Any

from mtp_mlx.serve.contents import THOUGHTS, message_text, result_text
from mtp_mlx.serve.fields import Fields, checked_text
from mtp_mlx.serve.request import RequestError
from mtp_mlx.serve.tools import ToolUse, by_choice, checked_tool, tool_list
from mtp_mlx.serve.turns import ROLES, Turn, call_turn, message_list, result_of

# Items of tools that run on OpenAI's servers, and of conversations shortened there: nobody here can read them.
ELSEWHERE = frozenset(
    "web_search_call file_search_call code_interpreter_call image_generation_call computer_call mcp_call "
    "mcp_list_tools mcp_approval_request mcp_approval_response tool_search_call tool_search_output compaction "
    "compaction_summary context_compaction".split()
)


def item_turns(items: Any, instructions: str | None, fields: Fields) -> list[Turn]:
    """The turns of a conversation. Reasoning, text and calls in a row are one turn of the assistant.

    Args:
        items: the request's `input`, a text or a list of items.
        instructions: the system message, or None.
        fields: of the request, which count the items that have no effect.

    Raises:
        RequestError: if an item is not as OpenAI describes it, holds anything but text, or refers to what a server
            would have to keep.
    """
    turns: list[Turn] = [] if instructions is None else [{"role": "system", "content": instructions}]
    if isinstance(items, str):
        return [*turns, {"role": "user", "content": checked_text(items, "input")}]
    names: dict[str, str] = {}  # of the tools called so far, by the call's id
    for i, item in enumerate(message_list(items, "input")):
        where, kind = f"input[{i}]", item.get("type", "message")
        if kind == "message":
            _message(turns, item, where)
        elif kind == "reasoning":
            _reasoning(turns, item, where)
        elif kind == "function_call":
            call = call_turn(item.get("call_id"), item.get("name"), item.get("arguments"), where)
            names[call["id"]] = call["function"]["name"]
            _assistant(turns).setdefault("tool_calls", []).append(call)
        elif kind == "custom_tool_call":
            call = call_turn(item.get("call_id"), item.get("name"), {"input": item.get("input")}, where)
            names[call["id"]] = call["function"]["name"]
            _assistant(turns).setdefault("tool_calls", []).append(call)
        elif kind in ("function_call_output", "custom_tool_call_output"):
            text = result_text(item.get("output"), f"{where}.output", fields)
            turns.append(
                {"role": "tool", "content": text, **result_of(item.get("call_id"), None, names, where)}
            )
        elif isinstance(kind, str) and kind in ELSEWHERE:
            fields.ignore(f"input.{kind}")
        else:
            raise RequestError(f"{where}: items of type {kind!r} are not supported", field="input")
    return turns


def _assistant(turns: list[Turn], *holding: str) -> Turn:
    """The assistant's turn that goes on: the last one if it has nothing of what must not come before, or a new one.

    Args:
        holding: names of what the turn may not hold yet.
    """
    last = turns[-1] if turns else None
    if last is None or last["role"] != "assistant" or any(last.get(name) for name in holding):
        turns.append({"role": "assistant", "content": ""})
    return turns[-1]


def _message(turns: list[Turn], item: Turn, where: str) -> None:
    role = item.get("role")
    if not isinstance(role, str) or role not in ROLES or role == "tool":
        raise RequestError(
            f"{where}: role must be one of user, assistant, system, developer, not {role!r}", field="input"
        )
    text = message_text(item.get("content"), f"{where}.content")
    if role == "assistant":
        _assistant(turns, "content", "tool_calls")["content"] = text
    else:
        turns.append({"role": ROLES[role], "content": text})


def _reasoning(turns: list[Turn], item: Turn, where: str) -> None:
    """Reasoning that came from here has content; from elsewhere it may have but a summary, or nothing readable."""
    text = message_text(item.get("content") or [], f"{where}.content", THOUGHTS)
    text = text or message_text(item.get("summary") or [], f"{where}.summary", THOUGHTS)
    if text:
        _assistant(turns, "content", "tool_calls", "reasoning_content")["reasoning_content"] = text


def tool_use(fields: Fields) -> ToolUse:
    """Take tools, tool_choice and parallel_tool_calls. Tools that are no functions are left out, and counted.

    Raises:
        RequestError: if one of them is invalid.
    """
    tools = []
    for i, tool in enumerate(tool_list(fields.take("tools"))):
        kind = checked_text(tool.get("type"), f"tools[{i}].type")
        if kind != "function":
            fields.ignore(f"tools.{kind}")
            continue
        tools.append(
            checked_tool(tool.get("name"), tool.get("description"), tool.get("parameters"), f"tools[{i}]")
        )
    parallel = fields.flag("parallel_tool_calls", default=True)
    return by_choice(tools, fields.take("tool_choice"), parallel)
