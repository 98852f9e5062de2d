"""Anthropic's messages API: parsing requests and writing responses.

In addition to Anthropic's fields, requests may have a seed, min_p and penalties, as in `openai_api.py`, and responses
have `mtp`.
"""

from __future__ import annotations

import json
import secrets
from typing import Any

from mtp_mlx.serve.fields import Fields, message_text
from mtp_mlx.serve.prompts import ChatPrompt, Prompts
from mtp_mlx.serve.request import GenerationRequest, Piece, RequestError, Summary
from mtp_mlx.serve.tools import ToolUse
from mtp_mlx.serve.turns import chat_turns

IGNORED = frozenset("metadata service_tier inference_geo cache_control".split())
ROLES = {"system": "system", "user": "user", "assistant": "assistant"}
TYPES = {
    401: "authentication_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
}


def error_body(error: RequestError) -> dict[str, Any]:
    """The JSON of an error."""
    kind = TYPES.get(error.status, "invalid_request_error" if error.status < 500 else "api_error")
    return {"type": "error", "error": {"type": kind, "message": error.message}}


def message(body: dict[str, Any], prompts: Prompts) -> MessageAnswer:
    """Parse a request to /v1/messages.

    Raises:
        RequestError: if a field is invalid or not supported.
    """
    fields = Fields(body, IGNORED)
    ids = _conversation(fields, prompts)
    stream = fields.flag("stream")
    max_tokens = fields.integer("max_tokens", minimum=1)
    if max_tokens is None:
        raise RequestError("max_tokens is missing", field="max_tokens")
    schema = _schema(fields)
    stop = fields.stops("stop_sequences")
    return MessageAnswer(prompts.request(ids, fields, max_tokens, stop, schema=schema), prompts, stream)


def count_tokens(body: dict[str, Any], prompts: Prompts) -> dict[str, Any]:
    """The response of /v1/messages/count_tokens; raises like `message`."""
    fields = Fields(body, IGNORED)
    return {"input_tokens": len(_conversation(fields, prompts).ids)}


def _conversation(fields: Fields, prompts: Prompts) -> ChatPrompt:
    prompts.check_model(fields)
    fields.refuse("tools", "tools", [])
    fields.refuse("tool_choice", "tools", {"type": "none"}, {"type": "auto"})
    fields.refuse("thinking", "the model has no such setting", {"type": "disabled"})
    messages, system = fields.take("messages"), fields.take("system")
    if (
        system is not None and isinstance(messages, list) and messages
    ):  # a system prompt alone is not a conversation
        messages = [{"role": "system", "content": message_text(system, "system")}, *messages]
    return prompts.chat(chat_turns(messages), ToolUse())


def _schema(fields: Fields) -> dict[str, Any] | None:
    """The JSON schema of `output_config.format`, or None."""
    config = fields.take("output_config")
    if config is None:
        return None
    if not isinstance(config, dict) or set(config) - {"format"}:
        raise RequestError("output_config: only format is supported", field="output_config")
    form = config.get("format")
    if form is None:
        return None
    if (
        not isinstance(form, dict)
        or form.get("type") != "json_schema"
        or not isinstance(form.get("schema"), dict)
    ):
        raise RequestError(
            "output_config.format must be a JSON schema of type json_schema", field="output_config"
        )
    schema: dict[str, Any] = form["schema"]
    return schema


def _event(value: dict[str, Any]) -> str:
    return f"event: {value['type']}\ndata: {json.dumps(value, ensure_ascii=False)}\n\n"


def _ending(summary: Summary) -> dict[str, Any]:
    """stop_reason and stop_sequence."""
    if summary.stop is not None:
        return {"stop_reason": "stop_sequence", "stop_sequence": summary.stop}
    reason = "max_tokens" if summary.finish_reason == "length" else "end_turn"
    return {"stop_reason": reason, "stop_sequence": None}


def _usage(summary: Summary) -> dict[str, Any]:
    """input_tokens excludes cached tokens; the sum of both is the length of the prompt."""
    return {
        "input_tokens": summary.prompt_tokens - summary.cached_tokens,
        "cache_read_input_tokens": summary.cached_tokens,
        "cache_creation_input_tokens": 0,
        "output_tokens": summary.generation_tokens,
    }


class MessageAnswer:
    """Writes the response to one request for /v1/messages."""

    def __init__(self, request: GenerationRequest, prompts: Prompts, stream: bool) -> None:
        self.request, self.stream = request, stream
        self._model = prompts.model_name
        self._id = f"msg_{secrets.token_hex(12)}"

    def _message(self, content: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "id": self._id,
            "type": "message",
            "role": "assistant",
            "model": self._model,
            "content": content,
            "stop_reason": None,
            "stop_sequence": None,
        }

    def whole(self, pieces: list[Piece]) -> dict[str, Any]:
        """See `Answer.whole`."""
        summary = pieces[-1].summary
        assert summary is not None
        text = "".join(piece.text for piece in pieces)
        answer = self._message([{"type": "text", "text": text}])
        return {**answer, **_ending(summary), "usage": _usage(summary), "mtp": summary.mtp}

    def opening(self) -> str:
        """See `Answer.opening`. The number of cached tokens is only known at the end."""
        usage = {"input_tokens": len(self.request.prompt), "output_tokens": 0}
        start = {"type": "message_start", "message": {**self._message([]), "usage": usage}}
        block = {"type": "content_block_start", "index": 0, "content_block": {"type": "text", "text": ""}}
        return _event(start) + _event(block)

    def events(self, piece: Piece) -> str:
        """See `Answer.events`."""
        delta = {"type": "text_delta", "text": piece.text}
        text = _event({"type": "content_block_delta", "index": 0, "delta": delta}) if piece.text else ""
        if piece.summary is None:
            return text
        summary = piece.summary
        end = {
            "type": "message_delta",
            "delta": _ending(summary),
            "usage": _usage(summary),
            "mtp": summary.mtp,
        }
        return (
            text
            + _event({"type": "content_block_stop", "index": 0})
            + _event(end)
            + _event({"type": "message_stop"})
        )

    def failure(self, error: RequestError) -> str:
        """See `Answer.failure`."""
        return _event(error_body(error))
