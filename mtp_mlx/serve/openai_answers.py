"""OpenAI's chat completions and completions APIs: writing responses and errors."""

from __future__ import annotations

import json
import secrets
import time
from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import asdict
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


def usage_of(summaries: list[Summary]) -> dict[str, Any]:
    """OpenAI's usage object: the prompt counts once, the texts all."""
    prompt = summaries[0].prompt_tokens
    written = sum(summary.generation_tokens for summary in summaries)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": written,
        "total_tokens": prompt + written,
        "prompt_tokens_details": {"cached_tokens": min(summary.cached_tokens for summary in summaries)},
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
        requests: for the engine, one for each choice.
        prompts: tokenizer and model name.
        stream: the client wants server-sent events.
        usage: end the stream with token counts.
    """

    kind = ""  # the field `object` of a response
    chunk_kind = ""

    def __init__(
        self, requests: tuple[GenerationRequest, ...], prompts: Prompts, stream: bool, usage: bool
    ) -> None:
        self.requests, self.stream = requests, stream
        self._prompts, self._usage = prompts, usage
        self._summaries: list[Summary] = []  # of the choices that have ended
        self._id = f"{self.kind.split('.')[0]}-{secrets.token_hex(12)}"
        self._created = int(time.time())

    def whole(self, texts: list[list[Piece]]) -> dict[str, Any]:
        """See `Answer.whole`."""
        choices = []
        for index, pieces in enumerate(texts):
            summary = pieces[-1].summary
            assert summary is not None
            self._summaries.append(summary)
            choice = {"index": index, **self._choice(pieces)}
            choice |= {"finish_reason": summary.finish_reason, "logprobs": self._logprobs(pieces)}
            choices.append(choice if len(texts) == 1 else {**choice, "mtp": summary.mtp})
        usage, mtp = usage_of(self._summaries), self._summaries[0].mtp
        return {**self._head(self.kind), "choices": choices, "usage": usage, "mtp": mtp}

    def opening(self) -> str:
        """See `Answer.opening`."""
        return ""

    def events(self, index: int, piece: Piece) -> str:
        """See `Answer.events`."""
        summary = piece.summary
        deltas = self._deltas(index, piece)
        if not deltas and (piece.logprob is not None or summary is not None):
            deltas = [self._empty()]
        chunks = [self._chunk(index, delta) for delta in deltas]
        if chunks:
            chunks[-1]["choices"][0]["logprobs"] = self._logprobs([piece])
        if piece.mark is not None:
            for chunk in chunks:
                chunk["mtp"] = asdict(piece.mark)
        if summary is None:
            return "".join(map(_event, chunks))
        chunks[-1]["choices"][0]["finish_reason"] = summary.finish_reason
        chunks[-1]["mtp"] = {**chunks[-1].get("mtp", {}), **summary.mtp}
        self._summaries.append(summary)
        if len(self._summaries) < len(self.requests):
            return "".join(map(_event, chunks))
        if self._usage:
            usage = usage_of(self._summaries)
            chunks.append({**self._head(self.chunk_kind), "choices": [], "usage": usage})
        return "".join(map(_event, chunks)) + "data: [DONE]\n\n"

    def failure(self, error: RequestError) -> str:
        """See `Answer.failure`."""
        return _event(error_body(error))

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self._id, "object": kind, "created": self._created, "model": self._prompts.model_name}

    @abstractmethod
    def _choice(self, pieces: list[Piece]) -> dict[str, Any]:
        """A choice of a complete response, from its pieces."""

    @abstractmethod
    def _deltas(self, index: int, piece: Piece) -> list[dict[str, Any]]:
        """What a piece adds to its choice, an event each."""

    @abstractmethod
    def _empty(self) -> dict[str, Any]:
        """An event's part of the choice that adds no text."""

    def _chunk(self, index: int, delta: dict[str, Any]) -> dict[str, Any]:
        choice = {"index": index, **delta, "logprobs": None, "finish_reason": None}
        return {**self._head(self.chunk_kind), "choices": [choice]}

    @abstractmethod
    def _logprobs(self, pieces: Iterable[Piece]) -> dict[str, Any] | None:
        """Log-probabilities of the tokens, or None if they were not requested."""

    def _spelt(self, token: int) -> str:
        return text_of(self._prompts.tokenizer, [token])


class ChatAnswer(_Answer):
    """Writes chat completions."""

    kind, chunk_kind = "chat.completion", "chat.completion.chunk"

    def __init__(
        self, requests: tuple[GenerationRequest, ...], prompts: Prompts, stream: bool, usage: bool
    ) -> None:
        super().__init__(requests, prompts, stream, usage)
        self._n_calls = [0] * len(requests)

    def opening(self) -> str:
        """See `Answer.opening`."""
        delta = {"delta": {"role": "assistant", "content": ""}}
        return "".join(_event(self._chunk(index, delta)) for index in range(len(self.requests)))

    def _choice(self, pieces: list[Piece]) -> dict[str, Any]:
        text = "".join(piece.text for piece in pieces)
        thinking = "".join(piece.thinking for piece in pieces)
        calls = [call for piece in pieces for call in piece.calls]
        message: dict[str, Any] = {"role": "assistant", "content": text, "refusal": None}
        if thinking:
            message |= _thoughts(thinking)
        if calls:
            message |= {"content": text or None, "tool_calls": [_call(call) for call in calls]}
        return {"message": message}

    def _deltas(self, index: int, piece: Piece) -> list[dict[str, Any]]:
        deltas: list[dict[str, Any]] = []
        if piece.thinking:
            deltas.append(_thoughts(piece.thinking))
        if piece.text:
            deltas.append({"content": piece.text})
        for call in piece.calls:
            begun = _call(call)
            begun["function"]["arguments"] = ""
            place = {"index": self._n_calls[index]}
            deltas.append({"tool_calls": [{**place, **begun}]})
            deltas.append({"tool_calls": [{**place, "function": {"arguments": call.arguments}}]})
            self._n_calls[index] += 1
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

    def __init__(
        self,
        requests: tuple[GenerationRequest, ...],
        prompts: Prompts,
        stream: bool,
        usage: bool,
        before: str = "",
    ) -> None:
        super().__init__(requests, prompts, stream, usage)
        self._before = before  # the prompt, if it is to be repeated

    def opening(self) -> str:
        """See `Answer.opening`."""
        indices = range(len(self.requests)) if self._before else ()
        return "".join(_event(self._chunk(index, {"text": self._before})) for index in indices)

    def _choice(self, pieces: list[Piece]) -> dict[str, Any]:
        return {"text": self._before + "".join(piece.text for piece in pieces)}

    def _deltas(self, index: int, piece: Piece) -> list[dict[str, Any]]:
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
