"""Anthropic's messages API: writing responses and errors."""

from __future__ import annotations

import json
import secrets
from typing import Any

from mtp_mlx.answer_parts import ToolCall
from mtp_mlx.serve.prompts import Prompts
from mtp_mlx.serve.request import GenerationRequest, Piece, RequestError, Summary

TYPES = {
    401: "authentication_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
}
# The field of a block that holds its text, and the type of the events that add to it.
TEXT_FIELDS = {"text": ("text", "text_delta"), "thinking": ("thinking", "thinking_delta")}


def error_body(error: RequestError) -> dict[str, Any]:
    """The JSON of an error."""
    kind = TYPES.get(error.status, "invalid_request_error" if error.status < 500 else "api_error")
    body: dict[str, Any] = {"type": kind, "message": error.message}
    if error.details is not None:
        body["details"] = error.details
    return {"type": "error", "error": body}


def _event(value: dict[str, Any]) -> str:
    return f"event: {value['type']}\ndata: {json.dumps(value, ensure_ascii=False)}\n\n"


def _ending(summary: Summary) -> dict[str, Any]:
    """stop_reason and stop_sequence."""
    if summary.finish_reason == "tool_calls":
        return {"stop_reason": "tool_use", "stop_sequence": None}
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


def _block(kind: str, text: str = "") -> dict[str, Any]:
    """A block of text or thinking; only Anthropic can sign thinking."""
    signature = {"signature": ""} if kind == "thinking" else {}
    return {"type": kind, TEXT_FIELDS[kind][0]: text, **signature}


def _call(call: ToolCall, arguments: Any) -> dict[str, Any]:
    return {"type": "tool_use", "id": call.id, "name": call.name, "input": arguments}


class MessageAnswer:
    """Writes the response to one request for /v1/messages.

    Args:
        request: for the engine.
        prompts: for the model's name.
        stream: the client wants server-sent events.
        shows_thinking: whether blocks of thinking have their text.
    """

    def __init__(
        self, request: GenerationRequest, prompts: Prompts, stream: bool, shows_thinking: bool = True
    ) -> None:
        self.requests: tuple[GenerationRequest, ...] = (request,)
        self.stream = stream
        self._shows_thinking = shows_thinking
        self._model = prompts.model_name
        self._id = f"msg_{secrets.token_hex(12)}"
        self._n_blocks = 0
        self._open: str | None = None  # kind of the block that is being streamed

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

    def _additions(self, piece: Piece) -> list[tuple[str, str]]:
        """(kind, text) of what a piece adds to blocks of thinking and text."""
        found = [("thinking", piece.thinking), ("text", piece.text)]
        return [(kind, text) for kind, text in found if text]

    def whole(self, texts: list[list[Piece]]) -> dict[str, Any]:
        """See `Answer.whole`."""
        (pieces,) = texts
        summary = pieces[-1].summary
        assert summary is not None
        blocks: list[dict[str, Any]] = []
        for piece in pieces:
            for kind, text in self._additions(piece):
                if not blocks or blocks[-1]["type"] != kind:
                    blocks.append(_block(kind))
                if kind == "text" or self._shows_thinking:
                    blocks[-1][TEXT_FIELDS[kind][0]] += text
            blocks += [_call(call, json.loads(call.arguments)) for call in piece.calls]
        answer = self._message(blocks or [_block("text")])
        return {**answer, **_ending(summary), "usage": _usage(summary), "mtp": summary.mtp}

    def opening(self) -> str:
        """See `Answer.opening`. The number of cached tokens is only known at the end."""
        usage = {"input_tokens": len(self.requests[0].prompt), "output_tokens": 0}
        return _event({"type": "message_start", "message": {**self._message([]), "usage": usage}})

    def events(self, index: int, piece: Piece) -> str:
        """See `Answer.events`."""
        found = ""
        for kind, text in self._additions(piece):
            if self._open != kind:
                found += self._close() + self._start(kind, _block(kind))
            if kind == "text" or self._shows_thinking:
                field, delta = TEXT_FIELDS[kind]
                found += self._delta({"type": delta, field: text})
        for call in piece.calls:
            found += self._close() + self._start("tool_use", _call(call, {}))
            found += self._delta({"type": "input_json_delta", "partial_json": call.arguments})
            found += self._close()
        if piece.summary is None:
            return found
        if not self._n_blocks:
            found += self._start("text", _block("text"))
        summary = piece.summary
        end = {
            "type": "message_delta",
            "delta": _ending(summary),
            "usage": _usage(summary),
            "mtp": summary.mtp,
        }
        return found + self._close() + _event(end) + _event({"type": "message_stop"})

    def failure(self, error: RequestError) -> str:
        """See `Answer.failure`."""
        return _event(error_body(error))

    # --- events of blocks -----------------------------------------------------------------------------------

    def _start(self, kind: str, block: dict[str, Any]) -> str:
        self._open, index = kind, self._n_blocks
        self._n_blocks += 1
        return _event({"type": "content_block_start", "index": index, "content_block": block})

    def _delta(self, delta: dict[str, Any]) -> str:
        return _event({"type": "content_block_delta", "index": self._n_blocks - 1, "delta": delta})

    def _close(self) -> str:
        """The end of the block that is open, if one is."""
        if self._open is None:
            return ""
        self._open = None
        return _event({"type": "content_block_stop", "index": self._n_blocks - 1})
