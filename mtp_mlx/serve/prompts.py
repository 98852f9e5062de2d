"""Turns a request's text into token ids, within the server's limits; shared by all HTTP APIs."""

from __future__ import annotations

import secrets
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from mlx_lm.tokenizer_utils import TokenizerWrapper

from mtp_mlx.answer_parts import PartsSettings, opens_thinking
from mtp_mlx.api import encode_prompt
from mtp_mlx.chat_template import Thinking, chat_ids, thinking_options
from mtp_mlx.decode.pick import SamplingConfig
from mtp_mlx.errors import MTPError
from mtp_mlx.message_ends import message_ends
from mtp_mlx.serve.contents import message_text
from mtp_mlx.serve.fields import Fields
from mtp_mlx.serve.grammar import Grammars
from mtp_mlx.serve.request import GenerationRequest, Piece, RequestError
from mtp_mlx.serve.tools import NO_TOOLS, ToolUse, call_schema, opening, writes_json
from mtp_mlx.serve.turns import Turn, variants
from mtp_mlx.token_ids import check_ids, spared_by_xtc, text_of

SEEDS = 2**53  # random seeds stay exact in JSON readers that only have doubles


@dataclass(frozen=True)
class Limits:
    """Limits of a request, and defaults for missing fields.

    Attributes:
        prompt, output: most tokens of the prompt, and of the text.
        default_output: most tokens of the text if the request has no max_tokens.
        sampling, thinking: if the request has none.
    """

    prompt: int = 32768
    output: int = 32768
    default_output: int = 1024
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    thinking: Thinking = "auto"


@dataclass(frozen=True)
class ChatPrompt:
    """A prompt as the model reads it.

    Attributes:
        ids: token ids, up to where the model goes on.
        parts: how to read what it writes; None to take all of it as the answer.
        schema: JSON schema of the tool call that it must write, or None.
        notes: what of the request had no effect, in words.
        ends: lengths at which messages end, if the prefix cache needs them.
    """

    ids: list[int]
    parts: PartsSettings | None
    schema: dict[str, Any] | None = None
    notes: tuple[str, ...] = ()
    ends: tuple[int, ...] = ()


@dataclass
class Prompts:
    """Builds requests for the engine.

    Attributes:
        model_name: the model's name in responses.
        vocab_size: token ids are below this.
        strict_model: refuse requests that name another model.
        find_ends: find where messages end, for a model whose cache cannot be trimmed.
    """

    tokenizer: TokenizerWrapper
    model_name: str
    vocab_size: int
    limits: Limits = field(default_factory=Limits)
    grammars: Grammars | None = None
    strict_model: bool = False
    find_ends: bool = False

    def check_model(self, fields: Fields) -> None:
        """Take the field `model`. Any name stands for the served model unless `strict_model`.

        Raises:
            RequestError: 404 if it names another one and `strict_model`.
        """
        name = fields.text("model")
        if self.strict_model and name not in (None, self.model_name, "default"):
            raise RequestError(
                f"this server serves the model {self.model_name!r}, not {name!r} (--strict-model)",
                status=404,
                field="model",
            )

    def chat(
        self,
        turns: list[Turn],
        tools: ToolUse,
        thinking: Thinking | None = None,
        options: dict[str, Any] | None = None,
    ) -> ChatPrompt:
        """A conversation in the chat template, up to where the answer begins.

        Args:
            turns: messages as chat templates read them.
            tools: that the model may call; if it must, its answer is begun with the opening tag.
            thinking: that the request asks for; None for the server's setting.
            options: further variables of the template.

        Raises:
            RequestError: if the model has no chat template or no tool calls, or the template rejects the messages.
        """
        tokenizer, notes = self.tokenizer, []
        if not tokenizer.has_chat_template:
            raise RequestError("this model has no chat template: use /v1/completions")
        if tools and not tokenizer.has_tool_calling:
            raise RequestError(NO_TOOLS, field="tools")
        switched = dict(options or {})
        try:
            wanted = "off" if tools.required else thinking or self.limits.thinking
            switched = {**thinking_options(tokenizer, wanted), **switched}
        except MTPError as error:
            if not tools.required:  # which ends the thinking itself, below
                notes.append(str(error))
        ids, ends, note = self._templated(turns, list(tools.tools) or None, switched)
        notes += note
        start = getattr(tokenizer, "response_initial_state", None) or "normal"
        if opens_thinking(tokenizer, ids):
            start = "reasoning"
        schema = None
        if tools.required:
            text = f"{tokenizer.think_end}\n\n" if start == "reasoning" else ""
            ids += tokenizer.encode(text + opening(tokenizer), add_special_tokens=False)
            start = "tool"
            schema = call_schema(tools.tools) if writes_json(tokenizer) and self.grammars else None
        parts = PartsSettings(start, tools.tools or None, tools.parallel)
        return ChatPrompt(ids, parts, schema, tuple(notes), ends)

    def _templated(
        self, turns: list[Turn], tools: list[dict[str, Any]] | None, options: dict[str, Any]
    ) -> tuple[list[int], tuple[int, ...], list[str]]:
        """Token ids of a conversation, its messages' ends, and what was changed so that the template takes it.

        Some templates take arguments of tool calls only as JSON text, and some only one system message, at the
        beginning; agents send several.
        """
        rejected: MTPError | None = None
        for variant, notes in variants(turns):
            try:
                ids = chat_ids(self.tokenizer, variant, tools, options)
            except MTPError as error:
                rejected = rejected or error
                continue
            if not self.find_ends:
                return ids, (), notes
            return ids, message_ends(self.tokenizer, variant, tools, options, ids), notes
        raise RequestError(str(rejected)) from None

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

    def spelt(self, prompt: Any, ids: list[int]) -> str:
        """The text of a prompt that `text` has read: as it was given, or that of its ids."""
        if isinstance(prompt, list) and len(prompt) == 1 and isinstance(prompt[0], str):
            prompt = prompt[0]
        return prompt if isinstance(prompt, str) else text_of(self.tokenizer, ids)

    def request(
        self,
        prompt: ChatPrompt | list[int],
        fields: Fields,
        max_tokens: int | None,
        stop: tuple[str, ...],
        top_logprobs: int | None = None,
        schema: dict[str, Any] | None = None,
    ) -> GenerationRequest:
        """Build the engine's request; takes the sampling from `fields`, and ignores any fields left over.

        Raises:
            RequestError: if a limit is exceeded, or a field is invalid.
        """
        limits = self.limits
        sampling = fields.sampling(limits.sampling, secrets.randbelow(SEEDS))
        if sampling.xtc_probability:
            sampling = replace(sampling, xtc_special_tokens=spared_by_xtc(self.tokenizer))
        if isinstance(prompt, list):
            prompt = ChatPrompt(prompt, None, ends=(len(prompt) - 1,))
        if schema is not None and prompt.schema is not None:
            raise RequestError("a JSON schema and a tool that must be called exclude each other")
        schema = schema or prompt.schema
        self._check_length(prompt.ids)
        self._check_ids([token for token, _ in sampling.logit_bias], "logit_bias")
        max_tokens = min(limits.default_output, limits.output) if max_tokens is None else max_tokens
        if max_tokens > limits.output:
            raise RequestError(
                f"max_tokens is {max_tokens}; this server allows at most {limits.output} "
                "(--max-output-tokens)",
                field="max_tokens",
            )
        grammar = None if schema is None else self.grammar(schema)
        return GenerationRequest(
            prompt.ids,
            max_tokens,
            sampling,
            stop,
            top_logprobs,
            grammar,
            prompt.parts,
            fields.left(),
            prompt.notes,
            ends=prompt.ends,
        )

    def _check_length(self, ids: list[int]) -> None:
        if not ids:
            raise RequestError("the prompt is empty", field="prompt")
        self._check_ids(ids, "prompt")
        if len(ids) > self.limits.prompt:
            raise RequestError(
                f"the prompt has {len(ids)} tokens; this server allows at most {self.limits.prompt} "
                "(--max-prompt-tokens)"
            )

    def _check_ids(self, ids: list[int], name: str) -> None:
        what = "the prompt" if name == "prompt" else name
        try:
            check_ids(ids, self.vocab_size, what, self.tokenizer)
        except MTPError as error:
            raise RequestError(str(error), field=name) from None

    def grammar(self, schema: dict[str, Any]) -> str:
        """The compiled grammar of a JSON schema.

        Raises:
            RequestError: if the schema is not supported, or the grammar library is not installed.
        """
        if self.grammars is None:
            raise RequestError(
                "JSON schemas are not available on this server, which was installed without the extra `serve`"
            )
        try:
            return self.grammars.from_schema(schema)
        except MTPError as error:
            raise RequestError(str(error)) from None


class Answer(Protocol):
    """How an HTTP API writes the response to one request.

    Attributes:
        requests: for the engine, one for each text that the client wants.
        stream: the client wants server-sent events.
    """

    requests: tuple[GenerationRequest, ...]
    stream: bool

    def whole(self, texts: list[list[Piece]]) -> dict[str, Any]:
        """The JSON of a response that is not streamed, from the pieces of each text."""
        ...

    def opening(self) -> str:
        """Events before the first piece."""
        ...

    def events(self, index: int, piece: Piece) -> str:
        """Events of a piece of a text; after the last piece of all, also those that end the stream."""
        ...

    def failure(self, error: RequestError) -> str:
        """The event that reports why a stream ends early."""
        ...
