"""Tools of a request: which the model may call, whether it must, and how it is made to.

A tool is kept in OpenAI's form, {"type": "function", "function": {"name", "description", "parameters"}}, which is
what chat templates and mlx-lm's tool parsers read. If a tool must be called, the answer is begun with the opening
tag, and if the model's calls are JSON, a grammar also holds it to the tools' names and parameters.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from mtp_mlx.serve.fields import checked_text
from mtp_mlx.serve.request import RequestError

MOST_TOOLS = 1024
LONGEST_NAME = 256
CHOICES = {"auto": "auto", "none": "none", "required": "required", "any": "required"}
JSON_CALLS = "mlx_lm.tool_parsers.json_tools"  # calls of the form {"name": ..., "arguments": {...}}
NO_TOOLS = "this model cannot call tools: its chat template has no form of tool call that mlx-lm reads"

Tool = dict[str, Any]


@dataclass(frozen=True)
class ToolUse:
    """The tools of a request.

    Attributes:
        tools: that the model is shown, in OpenAI's form.
        required: whether it must call one of them.
        parallel: whether it may call more than one.
    """

    tools: tuple[Tool, ...] = ()
    required: bool = False
    parallel: bool = True

    def __bool__(self) -> bool:
        return bool(self.tools)


def chosen(tools: list[Tool], choice: str, name: str | None, parallel: bool) -> ToolUse:
    """The tools that a choice leaves.

    Args:
        tools: all tools of the request.
        choice: "auto", "none", "required", or "named".
        name: the tool that must be called if it is "named".
        parallel: whether the model may call more than one.

    Raises:
        RequestError: if a tool is to be called and there is none, or none of that name.
    """
    if choice == "none":
        return ToolUse()
    if choice == "auto":
        return ToolUse(tuple(tools), parallel=parallel)
    if choice == "named":
        tools = [tool for tool in tools if tool["function"]["name"] == name]
    if not tools:
        called = "a tool" if name is None else f"the tool {name!r}"
        raise RequestError(f"tool_choice wants {called}, which is not in tools", field="tool_choice")
    return ToolUse(tuple(tools), required=True, parallel=parallel)


def by_choice(tools: list[Tool], choice: Any, parallel: bool) -> ToolUse:
    """The tools that OpenAI's `tool_choice` leaves, in the forms of chat completions and of responses.

    Args:
        tools: all tools of the request.
        choice: none for "auto"; "any" is "required" for some clients.
        parallel: as for `chosen`.

    Raises:
        RequestError: as `chosen`, or if the choice is none of these.
    """
    choice = "auto" if choice is None else choice
    if isinstance(choice, dict) and choice.get("type") == "allowed_tools":
        allowed = choice.get("allowed_tools", choice)
        names = {
            _named(tool) for tool in tool_list(allowed.get("tools") if isinstance(allowed, dict) else None)
        }
        tools = [tool for tool in tools if tool["function"]["name"] in names]
        choice = allowed.get("mode", "auto") if isinstance(allowed, dict) else choice
    if isinstance(choice, dict) and choice.get("type") in CHOICES:
        choice = choice["type"]
    if isinstance(choice, str) and choice in CHOICES:
        return chosen(tools, CHOICES[choice], None, parallel)
    name = _named(choice) if isinstance(choice, dict) else None
    if name is None:
        raise RequestError(
            "tool_choice must be none, auto, required, or an object that names a function or allowed tools",
            field="tool_choice",
        )
    return chosen(tools, "named", name, parallel)


def _named(tool: Any) -> str | None:
    """The name of a function in a choice, which either API has in another place."""
    inner = tool.get("function", tool) if isinstance(tool, dict) else None
    name = inner.get("name") if isinstance(inner, dict) else None
    return name if isinstance(name, str) else None


def checked_tool(name: Any, description: Any, parameters: Any, where: str) -> Tool:
    """A tool in OpenAI's form.

    Args:
        name, description, parameters: as they are in the request; the latter two may be None.
        where: the tool's place in the request, for errors.

    Raises:
        RequestError: if the name or the description is no text, or `parameters` is no JSON schema.
    """
    if not checked_text(name, f"{where}: name") or len(name) > LONGEST_NAME:
        raise RequestError(f"{where}: name must have 1 to {LONGEST_NAME} characters", field="tools")
    function: dict[str, Any] = {"name": name}
    if description is not None:
        function["description"] = checked_text(description, f"{where}: description")
    if parameters is None:
        parameters = {"type": "object", "properties": {}}
    if not isinstance(parameters, dict):
        raise RequestError(f"{where}: the parameters must be a JSON schema", field="tools")
    return {"type": "function", "function": {**function, "parameters": parameters}}


def tool_list(value: Any) -> list[Any]:
    """The field `tools` as a list; empty if it is missing.

    Raises:
        RequestError: if it is no list, or a long one.
    """
    if value is None:
        return []
    if not isinstance(value, list) or len(value) > MOST_TOOLS:
        raise RequestError(f"tools must be a list of at most {MOST_TOOLS} tools", field="tools")
    for i, tool in enumerate(value):
        if not isinstance(tool, dict):
            raise RequestError(f"tools[{i}] must be an object", field="tools")
    return value


def writes_json(tokenizer: Any) -> bool:
    """Whether the model's tool calls are JSON."""
    return getattr(tokenizer.tool_parser, "__module__", "") == JSON_CALLS


def opening(tokenizer: Any) -> str:
    """The text with which a tool call begins."""
    tag = str(tokenizer.tool_call_start)
    return f"{tag}\n" if writes_json(tokenizer) else tag


def call_schema(tools: tuple[Tool, ...]) -> dict[str, Any]:
    """The JSON schema of one call of one of these tools; definitions are moved to its root."""
    definitions: dict[str, Any] = {}
    calls = []
    for tool in tools:
        function = tool["function"]
        parameters = dict(function["parameters"])
        for keyword in ("$defs", "definitions"):
            own = parameters.pop(keyword, {})
            if isinstance(own, dict):
                definitions.setdefault(keyword, {}).update(own)
        calls.append(
            {
                "type": "object",
                "properties": {"name": {"const": function["name"]}, "arguments": parameters},
                "required": ["name", "arguments"],
                "additionalProperties": False,
            }
        )
    return {"anyOf": calls, **{keyword: own for keyword, own in definitions.items() if own}}
