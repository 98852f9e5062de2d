"""OpenAI's responses API as far as agents use it: parsing requests. Nothing is kept between requests."""

from __future__ import annotations

from typing import Any

from mtp_mlx.chat_template import Thinking
from mtp_mlx.serve.effort import effort_option, thinking_by
from mtp_mlx.serve.fields import Fields
from mtp_mlx.serve.openai_api import format_schema
from mtp_mlx.serve.prompts import Prompts
from mtp_mlx.serve.request import RequestError
from mtp_mlx.serve.responses_answers import ResponseAnswer
from mtp_mlx.serve.responses_turns import item_turns, tool_use

IGNORED = frozenset(
    "user metadata store include service_tier safety_identifier prompt_cache_key prompt_cache_retention "
    "prompt_cache_options truncation stream_options client_metadata".split()
)
SHOWN = ("tools", "tool_choice", "parallel_tool_calls", "instructions", "temperature", "top_p", "text")
KEPT_NOTHING = "this server keeps no responses: send the whole conversation as input"


def response(body: dict[str, Any], prompts: Prompts) -> ResponseAnswer:
    """Parse a request to /v1/responses.

    Raises:
        RequestError: if a field is invalid or not supported.
    """
    fields = Fields(body, IGNORED)
    prompts.check_model(fields)
    for name in ("previous_response_id", "conversation", "prompt"):
        fields.refuse(name, KEPT_NOTHING)
    fields.refuse("background", KEPT_NOTHING, False)
    stream = fields.flag("stream")
    max_tokens = fields.integer("max_output_tokens", minimum=1)
    tools = tool_use(fields)
    thinking, options = _reasoning(fields, prompts)
    schema = _schema(fields)
    turns = item_turns(fields.take("input"), fields.text("instructions"), fields)
    prompt = prompts.chat(turns, tools, thinking, options)
    request = prompts.request(prompt, fields, max_tokens, (), schema=schema)
    shown = {name: body[name] for name in SHOWN if body.get(name) is not None}
    return ResponseAnswer(request, prompts, stream, shown)


def _reasoning(fields: Fields, prompts: Prompts) -> tuple[Thinking | None, dict[str, Any]]:
    """Take `reasoning`: (thinking, variables of the template). Summaries are not written."""
    reasoning = fields.take("reasoning", {})
    if not isinstance(reasoning, dict):
        raise RequestError("reasoning must be an object", field="reasoning")
    effort = reasoning.get("effort")
    if effort is None:
        return None, {}
    return thinking_by(effort, "reasoning.effort"), effort_option(effort, prompts)


def _schema(fields: Fields) -> dict[str, Any] | None:
    """Take `text`: the JSON schema of its format."""
    text = fields.take("text", {})
    form = text.get("format") if isinstance(text, dict) else text
    if isinstance(form, dict) and form.get("type") == "json_schema":
        form = {"type": "json_schema", "json_schema": form}
    return format_schema(form, "text.format")
