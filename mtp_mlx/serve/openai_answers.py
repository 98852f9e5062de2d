"""OpenAI's chat completions and completions APIs: writing responses and errors."""

from __future__ import annotations

import json
import secrets
import time
from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import Any

from mtp_mlx.answer_parts import ToolCall
from mtp_mlx.serve.prompts import Prompts
from mtp_mlx.serve.request import GenerationRequest, Piece, RequestError, Summary, TokenLogprob
from mtp_mlx.token_ids import text_of

TYPES = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}


def error_body(error: RequestError) -> dict[str, Any]:
    """The JSON of an error."""
    kind = TYPES.get(error.status, "invalid_request_error" if error.status < 500 else "server_error")
    code = "model_not_found" if error.status == 404 and error.field == "model" else None
    return {"error": {"message": error.message, "type": kind, "param": error.field, "code": code}}


def _event(value: dict[str, Any]) -> str:
    return f"data: {json.dumps(value, ensure_ascii=False)}\n\n"


def usage_of(summary: Summary) -> dict[str, Any]:
    """OpenAI's usage object."""
    return {
        "prompt_tokens": summary.prompt_tokens,
        "completion_tokens": summary.generation_tokens,
        "total_tokens": summary.prompt_tokens + summary.generation_tokens,
        "prompt_tokens_details": {"cached_tokens": summary.cached_tokens},
    }


def _thoughts(text: str) -> dict[str, str]:
    """Thinking, under the name that most servers give it and under mlx-lm's."""
    return {"reasoning_content": text, "reasoning": text}


def _call(call: ToolCall) -> dict[str, Any]:
    return {
        "id": call.id,
        "type": "function",
        "function": {"name": call.name, "arguments": call.arguments},
    }


class _Answer(ABC):
    """What chat completions and completions have in common.

    Args:
        request: for the engine.
        prompts: tokenizer and model name.
        stream: the client wants server-sent events.
        usage: end the stream with token counts.
    """

    kind = ""  # the field `object` of a response
    chunk_kind = ""

    def __init__(self, request: GenerationRequest, prompts: Prompts, stream: bool, usage: bool) -> None:
        self.request, self.stream = request, stream
        self._prompts, self._usage = prompts, usage
        self._id = f"{self.kind.split('.')[0]}-{secrets.token_hex(12)}"
        self._created = int(time.time())

    def whole(self, pieces: list[Piece]) -> dict[str, Any]:
        """See `Answer.whole`."""
        summary = pieces[-1].summary
        assert summary is not None
        choice = self._choice(pieces)
        choice |= {"finish_reason": summary.finish_reason, "logprobs": self._logprobs(pieces)}
        return {
            **self._head(self.kind),
            "choices": [choice],
            "usage": usage_of(summary),
            "mtp": summary.mtp,
        }

    def opening(self) -> str:
        """See `Answer.opening`."""
        return ""

    def events(self, piece: Piece) -> str:
        """See `Answer.events`."""
        summary = piece.summary
        deltas = self._deltas(piece)
        if not deltas and (piece.logprob is not None or summary is not None):
            deltas = [self._empty()]
        chunks = [self._chunk(delta) for delta in deltas]
        if chunks:
            chunks[-1]["choices"][0]["logprobs"] = self._logprobs([piece])
        if summary is None:
            return "".join(map(_event, chunks))
        chunks[-1]["choices"][0]["finish_reason"] = summary.finish_reason
        chunks[-1]["mtp"] = summary.mtp
        if self._usage:
            chunks.append({**self._head(self.chunk_kind), "choices": [], "usage": usage_of(summary)})
        return "".join(map(_event, chunks)) + "data: [DONE]\n\n"

    def failure(self, error: RequestError) -> str:
        """See `Answer.failure`."""
        return _event(error_body(error))

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self._id, "object": kind, "created": self._created, "model": self._prompts.model_name}

    @abstractmethod
    def _choice(self, pieces: list[Piece]) -> dict[str, Any]:
        """The only choice of a complete response."""

    @abstractmethod
    def _deltas(self, piece: Piece) -> list[dict[str, Any]]:
        """What a piece adds to the choice, an event each."""

    @abstractmethod
    def _empty(self) -> dict[str, Any]:
        """An event's part of the choice that adds no text."""

    def _chunk(self, delta: dict[str, Any]) -> dict[str, Any]:
        choice = {"index": 0, **delta, "logprobs": None, "finish_reason": None}
        return {**self._head(self.chunk_kind), "choices": [choice]}

    @abstractmethod
    def _logprobs(self, pieces: Iterable[Piece]) -> dict[str, Any] | None:
        """Log-probabilities of the tokens, or None if they were not requested."""

    def _spelt(self, token: int) -> str:
        return text_of(self._prompts.tokenizer, [token])


class ChatAnswer(_Answer):
    """Writes chat completions."""

    kind, chunk_kind = "chat.completion", "chat.completion.chunk"

    def __init__(self, request: GenerationRequest, prompts: Prompts, stream: bool, usage: bool) -> None:
        super().__init__(request, prompts, stream, usage)
        self._n_calls = 0

    def opening(self) -> str:
        """See `Answer.opening`."""
        return _event(self._chunk({"delta": {"role": "assistant", "content": ""}}))

    def _choice(self, pieces: list[Piece]) -> dict[str, Any]:
        text = "".join(piece.text for piece in pieces)
        thinking = "".join(piece.thinking for piece in pieces)
        calls = [call for piece in pieces for call in piece.calls]
        message: dict[str, Any] = {"role": "assistant", "content": text, "refusal": None}
        if thinking:
            message |= _thoughts(thinking)
        if calls:
            message |= {"content": text or None, "tool_calls": [_call(call) for call in calls]}
        return {"index": 0, "message": message}

    def _deltas(self, piece: Piece) -> list[dict[str, Any]]:
        deltas: list[dict[str, Any]] = []
        if piece.thinking:
            deltas.append(_thoughts(piece.thinking))
        if piece.text:
            deltas.append({"content": piece.text})
        for call in piece.calls:
            begun = _call(call)
            begun["function"]["arguments"] = ""
            deltas.append({"tool_calls": [{"index": self._n_calls, **begun}]})
            more = {"index": self._n_calls, "function": {"arguments": call.arguments}}
            deltas.append({"tool_calls": [more]})
            self._n_calls += 1
        return [{"delta": delta} for delta in deltas]

    def _empty(self) -> dict[str, Any]:
        return {"delta": {}}

    def _logprobs(self, pieces: Iterable[Piece]) -> dict[str, Any] | None:
        found = [piece.logprob for piece in pieces if piece.logprob is not None]
        return {"content": [self._entry(logprob) for logprob in found], "refusal": None} if found else None

    def _entry(self, logprob: TokenLogprob) -> dict[str, Any]:
        top = [self._one(token, value) for token, value in logprob.top]
        return {**self._one(logprob.token, logprob.logprob), "top_logprobs": top}

    def _one(self, token: int, value: float) -> dict[str, Any]:
        text = self._spelt(token)
        part = "\ufffd" in text  # only part of a character: the decoded text does not tell its bytes
        return {"token": text, "logprob": value, "bytes": None if part else list(text.encode("utf-8"))}


class CompletionAnswer(_Answer):
    """Writes completions."""

    kind, chunk_kind = "text_completion", "text_completion"

    def _choice(self, pieces: list[Piece]) -> dict[str, Any]:
        return {"index": 0, "text": "".join(piece.text for piece in pieces)}

    def _deltas(self, piece: Piece) -> list[dict[str, Any]]:
        return [{"text": piece.text}] if piece.text else []

    def _empty(self) -> dict[str, Any]:
        return {"text": ""}

    def _logprobs(self, pieces: Iterable[Piece]) -> dict[str, Any] | None:
        found = [piece.logprob for piece in pieces if piece.logprob is not None]
        if not found:
            return None
        return {
            "tokens": [self._spelt(logprob.token) for logprob in found],
            "token_logprobs": [logprob.logprob for logprob in found],
            "top_logprobs": [
                {self._spelt(token): value for token, value in logprob.top} for logprob in found
            ],
        }
