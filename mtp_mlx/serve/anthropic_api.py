"""Anthropic's messages API: parsing requests.

In addition to Anthropic's fields, requests may have a seed, min_p and penalties, as in `openai_api.py`, and responses
have `mtp`.
"""

from __future__ import annotations

from typing import Any

from mtp_mlx.chat_template import Thinking
from mtp_mlx.serve.anthropic_answers import MessageAnswer
from mtp_mlx.serve.anthropic_turns import message_turns, tool_use
from mtp_mlx.serve.effort import effort_option, thinking_by
from mtp_mlx.serve.fields import Fields, checked_text
from mtp_mlx.serve.prompts import ChatPrompt, Prompts
from mtp_mlx.serve.request import RequestError

IGNORED = frozenset("metadata service_tier inference_geo cache_control speed user_profile_id".split())
THINKING: dict[str, Thinking] = {"enabled": "on", "adaptive": "on", "between_tools": "on", "disabled": "off"}


def message(body: dict[str, Any], prompts: Prompts) -> MessageAnswer:
    """Parse a request to /v1/messages.

    Raises:
        RequestError: if a field is invalid or not supported.
    """
    fields = Fields(body, IGNORED)
    prompt, schema, shows_thinking = _conversation(fields, prompts)
    stream = fields.flag("stream")
    max_tokens = fields.integer("max_tokens", minimum=1)
    if max_tokens is None:
        raise RequestError("max_tokens is missing", field="max_tokens")
    stop = fields.stops("stop_sequences")
    request = prompts.request(prompt, fields, max_tokens, stop, schema=schema)
    return MessageAnswer(request, prompts, stream, shows_thinking)


def count_tokens(body: dict[str, Any], prompts: Prompts) -> dict[str, Any]:
    """The response of /v1/messages/count_tokens; raises like `message`."""
    prompt, _, _ = _conversation(Fields(body, IGNORED), prompts)
    return {"input_tokens": len(prompt.ids)}


def _conversation(fields: Fields, prompts: Prompts) -> tuple[ChatPrompt, dict[str, Any] | None, bool]:
    """(the conversation, the schema of the answer, whether the response shows thinking)."""
    prompts.check_model(fields)
    _refuse_threads(fields)
    tools = tool_use(fields)
    thinking, shown = _thinking(fields)
    schema, effort = _output_config(fields)
    options: dict[str, Any] = {}
    if effort is not None:
        thinking = thinking or thinking_by(effort, "output_config.effort")
        options = effort_option(effort, prompts)
    turns = message_turns(fields.take("messages"), fields.take("system"), fields)
    return prompts.chat(turns, tools, thinking, options), schema, shown


def _refuse_threads(fields: Fields) -> None:
    """Refuse a conversation of which the server should keep the earlier messages.

    Ignoring it would lose them. Anthropic's client reads the details, and sends whole conversations from then on.
    """
    if fields.take("thread") is not None:
        details = {"error_code": "thread_unsupported_request", "unsupported": ["thread"]}
        raise RequestError(
            "thread is not supported: send the whole conversation", field="thread", details=details
        )


def _thinking(fields: Fields) -> tuple[Thinking | None, bool]:
    """Take `thinking`: (on, off or None, whether the response shows it)."""
    value = fields.take("thinking")
    if value is None:
        return None, True
    kind = value.get("type") if isinstance(value, dict) else None
    if not isinstance(kind, str) or kind not in THINKING:
        raise RequestError(
            f"thinking must be an object whose type is one of {', '.join(THINKING)}", field="thinking"
        )
    if value.get("budget_tokens") is not None:
        fields.ignore("thinking.budget_tokens")
    return THINKING[kind], value.get("display") != "omitted"


def _output_config(fields: Fields) -> tuple[dict[str, Any] | None, str | None]:
    """Take `output_config`: (JSON schema of its format, its effort)."""
    config = fields.take("output_config", {})
    if not isinstance(config, dict):
        raise RequestError("output_config must be an object", field="output_config")
    for name in sorted(set(config) - {"format", "effort"}):
        fields.ignore(f"output_config.{checked_text(name, 'output_config')}")
    form, effort = config.get("format"), config.get("effort")
    if form is None:
        return None, effort
    if (
        not isinstance(form, dict)
        or form.get("type") != "json_schema"
        or not isinstance(form.get("schema"), dict)
    ):
        raise RequestError(
            "output_config.format must be a JSON schema of type json_schema", field="output_config"
        )
    schema: dict[str, Any] = form["schema"]
    return schema, effort
