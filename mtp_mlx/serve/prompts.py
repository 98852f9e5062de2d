"""Turns a request's text into token ids, within the server's limits; shared by all HTTP APIs."""

from __future__ import annotations

import secrets
from dataclasses import dataclass, field
from typing import Any, Protocol

from mlx_lm.tokenizer_utils import TokenizerWrapper

from mtp_mlx.api import encode_prompt
from mtp_mlx.chat_template import chat_ids
from mtp_mlx.errors import MTPError
from mtp_mlx.serve.fields import Fields, message_text
from mtp_mlx.serve.grammar import Grammars
from mtp_mlx.serve.request import GenerationRequest, Piece, RequestError
from mtp_mlx.token_ids import check_ids

MOST_MESSAGES = 4096
SEEDS = 2**53  # random seeds stay exact in JSON readers that only have doubles


@dataclass(frozen=True)
class Limits:
    """Limits of a request, and defaults for missing fields.

    Attributes:
        prompt, output: most tokens of the prompt, and of the text.
        default_output: most tokens of the text if the request has no max_tokens.
        temperature: if the request has none.
    """

    prompt: int = 32768
    output: int = 32768
    default_output: int = 1024
    temperature: float = 0.0


@dataclass
class Prompts:
    """Builds requests for the engine.

    Attributes:
        model_name: the model's name in requests and responses.
        vocab_size: token ids are below this.
    """

    tokenizer: TokenizerWrapper
    model_name: str
    vocab_size: int
    limits: Limits = field(default_factory=Limits)
    grammars: Grammars | None = None

    def check_model(self, fields: Fields) -> None:
        """Take the field `model`, which must name the served model.

        Raises:
            RequestError: 404 if it names another one.
        """
        name = fields.text("model")
        if name not in (None, self.model_name, "default"):
            raise RequestError(
                f"this server serves the model {self.model_name!r}, not {name!r}", status=404, field="model"
            )

    def conversation(self, messages: Any, roles: dict[str, str]) -> list[int]:
        """Token ids of a conversation, up to where the answer begins.

        Args:
            messages: a list of {"role", "content"}.
            roles: role in the request -> role in the chat template.

        Raises:
            RequestError: if `messages` is not such a list, or the template rejects it.
        """
        if not isinstance(messages, list) or not 1 <= len(messages) <= MOST_MESSAGES:
            raise RequestError(f"messages must be a list of 1 to {MOST_MESSAGES} messages", field="messages")
        if not self.tokenizer.has_chat_template:
            raise RequestError("this model has no chat template: use /v1/completions")
        turns = [_turn(message, f"messages[{i}]", roles) for i, message in enumerate(messages)]
        try:
            return chat_ids(self.tokenizer, turns)
        except MTPError as error:
            raise RequestError(str(error)) from None

    def text(self, prompt: Any) -> list[int]:
        """Token ids of a prompt, which is a string or a list of ids."""
        if isinstance(prompt, list) and len(prompt) == 1 and isinstance(prompt[0], (str, list)):
            prompt = prompt[0]
        if isinstance(prompt, str):
            return encode_prompt(self.tokenizer, message_text(prompt, "prompt"))
        if not isinstance(prompt, list) or not all(type(token) is int for token in prompt):
            raise RequestError(
                "prompt must be one string, or one list of token ids of this model", field="prompt"
            )
        return list(prompt)

    def request(
        self,
        prompt: list[int],
        fields: Fields,
        max_tokens: int | None,
        stop: tuple[str, ...],
        top_logprobs: int | None = None,
        schema: dict[str, Any] | None = None,
    ) -> GenerationRequest:
        """Build the engine's request; takes the sampling from `fields` and refuses any fields left over.

        Raises:
            RequestError: if a limit is exceeded, or a field is invalid or unknown.
        """
        limits = self.limits
        sampling = fields.sampling(limits.temperature, secrets.randbelow(SEEDS))
        fields.end()
        if not prompt:
            raise RequestError("the prompt is empty", field="prompt")
        try:
            check_ids(prompt, self.vocab_size, "the prompt", self.tokenizer)
        except MTPError as error:
            raise RequestError(str(error), field="prompt") from None
        if len(prompt) > limits.prompt:
            raise RequestError(
                f"the prompt has {len(prompt)} tokens; this server allows at most {limits.prompt} "
                "(--max-prompt-tokens)"
            )
        max_tokens = min(limits.default_output, limits.output) if max_tokens is None else max_tokens
        if max_tokens > limits.output:
            raise RequestError(
                f"max_tokens is {max_tokens}; this server allows at most {limits.output} "
                "(--max-output-tokens)",
                field="max_tokens",
            )
        grammar = None if schema is None else self.grammar(schema)
        return GenerationRequest(prompt, max_tokens, sampling, stop, top_logprobs, grammar)

    def grammar(self, schema: dict[str, Any]) -> str:
        """The compiled grammar of a JSON schema.

        Raises:
            RequestError: if the schema is not supported, or the grammar library is not installed.
        """
        if self.grammars is None:
            raise RequestError("JSON schemas are not available on this server: install mtp-mlx[serve]")
        try:
            return self.grammars.from_schema(schema)
        except MTPError as error:
            raise RequestError(str(error)) from None


def _turn(message: Any, where: str, roles: dict[str, str]) -> dict[str, str]:
    if not isinstance(message, dict):
        raise RequestError(f"{where} must be an object with role and content", field="messages")
    role = message.get("role")
    if not isinstance(role, str) or role not in roles:
        raise RequestError(f"{where}: role must be one of {', '.join(roles)}, not {role!r}", field="messages")
    for name in ("tool_calls", "function_call", "audio"):
        if message.get(name):
            raise RequestError(f"{where}: {name} is not supported", field="messages")
    return {"role": roles[role], "content": message_text(message.get("content"), f"{where}.content")}


class Answer(Protocol):
    """How an HTTP API writes the response to one request.

    Attributes:
        request: for the engine.
        stream: the client wants server-sent events.
    """

    request: GenerationRequest
    stream: bool

    def whole(self, pieces: list[Piece]) -> dict[str, Any]:
        """The JSON of a response that is not streamed."""
        ...

    def opening(self) -> str:
        """Events before the first piece."""
        ...

    def events(self, piece: Piece) -> str:
        """Events of a piece; after the last piece, also those that end the stream."""
        ...

    def failure(self, error: RequestError) -> str:
        """The event that reports why a stream ends early."""
        ...
