"""OpenAI's responses API: writing responses. A text becomes items: reasoning, a message, calls of functions."""

from __future__ import annotations

import json
import secrets
import time
from typing import Any

from mtp_mlx.answer_parts import ToolCall
from mtp_mlx.serve.prompts import Prompts
from mtp_mlx.serve.request import GenerationRequest, Piece, RequestError, Summary

# Of an item that holds text: the type of its part, after which the events about its text are named.
PARTS = {"reasoning": "reasoning_text", "message": "output_text"}
DEFAULTS: dict[str, Any] = {
    "instructions": None,
    "parallel_tool_calls": True,
    "temperature": None,
    "text": {"format": {"type": "text"}},
    "tool_choice": "auto",
    "tools": [],
    "top_p": None,
}


def _logprobs(kind: str) -> dict[str, Any]:
    """Clients expect log-probabilities of messages, and none of reasoning."""
    return {"logprobs": []} if kind == "message" else {}


class ResponseAnswer:
    """Writes the response to one request for /v1/responses.

    Args:
        request: for the engine.
        prompts: for the model's name.
        stream: the client wants server-sent events.
        shown: fields of the request that the response repeats.
    """

    def __init__(
        self, request: GenerationRequest, prompts: Prompts, stream: bool, shown: dict[str, Any]
    ) -> None:
        self.requests: tuple[GenerationRequest, ...] = (request,)
        self.stream = stream
        self._shown = {**DEFAULTS, **shown}
        self._model = prompts.model_name
        self._id, self._created = f"resp_{secrets.token_hex(16)}", time.time()
        self._output: list[dict[str, Any]] = []
        self._open: str | None = None  # type of the last item while it is being written
        self._n_events = self._n_thinking = 0

    def whole(self, texts: list[list[Piece]]) -> dict[str, Any]:
        """See `Answer.whole`."""
        (pieces,) = texts
        for piece in pieces:
            self.events(0, piece)
        summary = pieces[-1].summary
        assert summary is not None
        return self._response(summary)

    def opening(self) -> str:
        """See `Answer.opening`."""
        begun = self._response()
        return self._event("response.created", response=begun) + self._event(
            "response.in_progress", response=begun
        )

    def events(self, index: int, piece: Piece) -> str:
        """See `Answer.events`."""
        found = ""
        if piece.thinking:
            self._n_thinking += 1
            found += self._add("reasoning", piece.thinking)
        if piece.text:
            found += self._add("message", piece.text)
        for call in piece.calls:
            found += self._close() + self._call(call)
        if piece.summary is None:
            return found
        cut = piece.summary.finish_reason == "length"
        found += self._close("incomplete" if cut else "completed")
        kind = "response.incomplete" if cut else "response.completed"
        return found + self._event(kind, response=self._response(piece.summary))

    def failure(self, error: RequestError) -> str:
        """See `Answer.failure`."""
        failed = {"status": "failed", "error": {"code": "server_error", "message": error.message}}
        return self._event("response.failed", response={**self._response(), **failed})

    def _response(self, summary: Summary | None = None) -> dict[str, Any]:
        """The response as far as it has got."""
        request = self.requests[0]
        cut = summary is not None and summary.finish_reason == "length"
        status = "in_progress" if summary is None else "incomplete" if cut else "completed"
        found = {
            "id": self._id,
            "object": "response",
            "created_at": self._created,
            "status": status,
            "error": None,
            "incomplete_details": {"reason": "max_output_tokens"} if cut else None,
            "max_output_tokens": request.max_tokens,
            "metadata": {},
            "model": self._model,
            "output": list(self._output),
            "previous_response_id": None,
            "store": False,
            "truncation": "disabled",
            "usage": None if summary is None else self._usage(summary),
            **self._shown,
        }
        return found if summary is None else {**found, "mtp": summary.mtp}

    def _usage(self, summary: Summary) -> dict[str, Any]:
        return {
            "input_tokens": summary.prompt_tokens,
            "input_tokens_details": {"cached_tokens": summary.cached_tokens},
            "output_tokens": summary.generation_tokens,
            "output_tokens_details": {"reasoning_tokens": self._n_thinking},
            "total_tokens": summary.prompt_tokens + summary.generation_tokens,
        }

    # --- items ----------------------------------------------------------------------------------------------

    def _event(self, kind: str, **fields: Any) -> str:
        value = {"type": kind, "sequence_number": self._n_events, **fields}
        self._n_events += 1
        return f"event: {kind}\ndata: {json.dumps(value, ensure_ascii=False)}\n\n"

    def _place(self) -> dict[str, Any]:
        """Where the last item is; its text is in its only part."""
        return {"item_id": self._output[-1]["id"], "output_index": len(self._output) - 1, "content_index": 0}

    def _add(self, kind: str, text: str) -> str:
        """Text for an item of a kind, which begins if it is not the one that is being written."""
        found = ""
        if self._open != kind:
            found += self._close() + self._start(kind)
        self._output[-1]["content"][0]["text"] += text
        return found + self._event(
            f"response.{PARTS[kind]}.delta", **self._place(), delta=text, **_logprobs(kind)
        )

    def _start(self, kind: str) -> str:
        role: dict[str, Any] = {"role": "assistant"} if kind == "message" else {"summary": []}
        identity = f"{kind[:3]}_{secrets.token_hex(12)}"
        item = {"id": identity, "type": kind, "status": "in_progress", "content": [], **role}
        self._output.append(item)
        self._open = kind
        notes: dict[str, Any] = {"annotations": []} if kind == "message" else {}
        part = {"type": PARTS[kind], "text": "", **notes, **_logprobs(kind)}
        added = self._event("response.output_item.added", output_index=len(self._output) - 1, item=item)
        item["content"].append(part)
        return added + self._event("response.content_part.added", **self._place(), part=part)

    def _close(self, status: str = "completed") -> str:
        """The end of the item that is being written, if there is one."""
        if self._open is None:
            return ""
        kind, item = self._open, self._output[-1]
        self._open, item["status"] = None, status
        (part,) = item["content"]
        return (
            self._event(f"response.{PARTS[kind]}.done", **self._place(), text=part["text"], **_logprobs(kind))
            + self._event("response.content_part.done", **self._place(), part=part)
            + self._event("response.output_item.done", output_index=len(self._output) - 1, item=item)
        )

    def _call(self, call: ToolCall) -> str:
        item = {"id": f"fc_{secrets.token_hex(12)}", "type": "function_call", "status": "in_progress"}
        item |= {"call_id": call.id, "name": call.name, "arguments": ""}
        self._output.append(item)
        place = {"item_id": item["id"], "output_index": len(self._output) - 1}
        found = self._event("response.output_item.added", output_index=place["output_index"], item=item)
        found += self._event("response.function_call_arguments.delta", **place, delta=call.arguments)
        item |= {"arguments": call.arguments, "status": "completed"}
        found += self._event(
            "response.function_call_arguments.done", **place, name=call.name, arguments=call.arguments
        )
        return found + self._event("response.output_item.done", output_index=place["output_index"], item=item)
