"""OpenAI's chat completions and completions APIs: parsing requests and writing responses.

In addition to OpenAI's fields, requests may have top_k, min_p, repetition_penalty and the context sizes of penalties
(all as in mlx-lm), and responses have `mtp`. Penalties work as in mlx-lm: they look at the last 20 tokens, including
the prompt's, unless a context size is given.
"""

from __future__ import annotations

import json
import secrets
import time
from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import Any

from mtp_mlx.serve.fields import Fields
from mtp_mlx.serve.prompts import Prompts
from mtp_mlx.serve.request import GenerationRequest, Piece, RequestError, Summary, TokenLogprob
from mtp_mlx.token_ids import text_of

# Fields that have no effect on the text of a local model.
IGNORED = frozenset(
    "user metadata store service_tier safety_identifier prompt_cache_key prompt_cache_retention "
    "parallel_tool_calls verbosity".split()
)
ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}
TYPES = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}
NO_TOOLS = "this server does not call tools"


def error_body(error: RequestError) -> dict[str, Any]:
    """The JSON of an error."""
    kind = TYPES.get(error.status, "invalid_request_error" if error.status < 500 else "server_error")
    code = "model_not_found" if error.status == 404 and error.field == "model" else None
    return {"error": {"message": error.message, "type": kind, "param": error.field, "code": code}}


def chat(body: dict[str, Any], prompts: Prompts) -> ChatAnswer:
    """Parse a request to /v1/chat/completions.

    Raises:
        RequestError: if a field is invalid or not supported.
    """
    fields = Fields(body, IGNORED)
    prompts.check_model(fields)
    _refuse_common(fields)
    for name in ("tools", "functions"):
        fields.refuse(name, NO_TOOLS, [])
    for name in ("tool_choice", "function_call"):
        fields.refuse(name, NO_TOOLS, "none", "auto")
    fields.refuse("modalities", "this server writes text only", ["text"])
    top = fields.integer("top_logprobs", most=20)
    if fields.flag("logprobs"):
        top = top or 0
    elif top is not None:
        raise RequestError("top_logprobs needs logprobs: true", field="top_logprobs")
    stream, usage = _streaming(fields)
    newer = fields.integer("max_completion_tokens", minimum=1)
    older = fields.integer("max_tokens", minimum=1)
    schema = _schema(fields.take("response_format"))
    stop = fields.stops("stop")
    ids = prompts.conversation(fields.take("messages"), ROLES)
    request = prompts.request(ids, fields, newer or older, stop, top, schema)
    return ChatAnswer(request, prompts, stream, usage)


def completion(body: dict[str, Any], prompts: Prompts) -> CompletionAnswer:
    """Parse a request to /v1/completions; raises like `chat`."""
    fields = Fields(body, IGNORED)
    prompts.check_model(fields)
    _refuse_common(fields)
    fields.refuse("echo", "the prompt is not repeated", False)
    fields.refuse("best_of", "one answer is written", 1)
    fields.refuse("suffix", "text can only follow the prompt", "")
    top = fields.integer("logprobs", most=20)
    stream, usage = _streaming(fields)
    max_tokens = fields.integer("max_tokens", minimum=1)
    schema = _schema(fields.take("response_format"))
    stop = fields.stops("stop")
    ids = prompts.text(fields.take("prompt"))
    return CompletionAnswer(
        prompts.request(ids, fields, max_tokens, stop, top, schema), prompts, stream, usage
    )


def models(prompts: Prompts, created: int) -> dict[str, Any]:
    """The JSON of /v1/models."""
    entry = {"id": prompts.model_name, "object": "model", "created": created, "owned_by": "local"}
    return {"object": "list", "data": [entry]}


def _refuse_common(fields: Fields) -> None:
    fields.refuse("n", "one answer is written", 1)
    fields.refuse("logit_bias", "only penalties and a schema change logits", {})
    fields.refuse("reasoning_effort", "the model has no such setting", "none")


def _streaming(fields: Fields) -> tuple[bool, bool]:
    """(whether to stream, whether to end the stream with usage)."""
    options = fields.take("stream_options", {})
    stream = fields.flag("stream")
    if not isinstance(options, dict) or set(options) - {"include_usage", "include_obfuscation"}:
        raise RequestError("stream_options: only include_usage is supported", field="stream_options")
    return stream, options.get("include_usage") is True


def _schema(response_format: Any) -> dict[str, Any] | None:
    """The JSON schema of a response_format; None for text."""
    if response_format is None:
        return None
    kind = response_format.get("type") if isinstance(response_format, dict) else None
    if kind == "text":
        return None
    if kind == "json_object":
        return {"type": "object"}
    if kind == "json_schema":
        described = response_format.get("json_schema")
        schema = described.get("schema") if isinstance(described, dict) else None
        if isinstance(schema, dict):
            return schema
        raise RequestError(
            "response_format.json_schema.schema must be a JSON schema", field="response_format"
        )
    raise RequestError(
        "response_format.type must be text, json_object or json_schema", field="response_format"
    )


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
        choice = self._choice("".join(piece.text for piece in pieces))
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
        if not piece.text and piece.logprob is None and summary is None:
            return ""
        reason = None if summary is None else summary.finish_reason
        choice = self._delta(piece.text) | {"logprobs": self._logprobs([piece]), "finish_reason": reason}
        chunk: dict[str, Any] = {**self._head(self.chunk_kind), "choices": [choice]}
        if summary is None:
            return _event(chunk)
        chunk["mtp"] = summary.mtp
        last = ""
        if self._usage:
            last = _event({**self._head(self.chunk_kind), "choices": [], "usage": usage_of(summary)})
        return _event(chunk) + last + "data: [DONE]\n\n"

    def failure(self, error: RequestError) -> str:
        """See `Answer.failure`."""
        return _event(error_body(error))

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self._id, "object": kind, "created": self._created, "model": self._prompts.model_name}

    @abstractmethod
    def _choice(self, text: str) -> dict[str, Any]:
        """The only choice of a complete response."""

    @abstractmethod
    def _delta(self, text: str) -> dict[str, Any]:
        """The only choice of an event, with the new text."""

    @abstractmethod
    def _logprobs(self, pieces: Iterable[Piece]) -> dict[str, Any] | None:
        """Log-probabilities of the tokens, or None if they were not requested."""

    def _spelt(self, token: int) -> str:
        return text_of(self._prompts.tokenizer, [token])


class ChatAnswer(_Answer):
    """Writes chat completions."""

    kind, chunk_kind = "chat.completion", "chat.completion.chunk"

    def opening(self) -> str:
        """See `Answer.opening`."""
        delta = {"role": "assistant", "content": ""}
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": None}
        return _event({**self._head(self.chunk_kind), "choices": [choice]})

    def _choice(self, text: str) -> dict[str, Any]:
        return {"index": 0, "message": {"role": "assistant", "content": text, "refusal": None}}

    def _delta(self, text: str) -> dict[str, Any]:
        return {"index": 0, "delta": {"content": text} if text else {}}

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

    def _choice(self, text: str) -> dict[str, Any]:
        return {"index": 0, "text": text}

    _delta = _choice

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
