"""Requests to the engine and its events, independent of the HTTP API."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from mtp_mlx.answer_parts import PartsSettings, ToolCall
from mtp_mlx.decode.pick import SamplingConfig


class RequestError(Exception):
    """A request that cannot be answered: one sentence for the client.

    Attributes:
        status: HTTP status.
        field: the field of the request that caused it, or None.
        details: for clients that go on in another way after some errors.
    """

    def __init__(
        self,
        message: str,
        status: int = 400,
        field: str | None = None,
        details: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(message)
        self.message, self.status, self.field, self.details = message, status, field, details


@dataclass(frozen=True)
class GenerationRequest:
    """One text to write.

    Attributes:
        prompt: token ids.
        max_tokens: most tokens to write, at least 1.
        sampling: how tokens are picked, including the seed.
        stop: strings that end the text and are not part of it.
        top_logprobs: number of alternatives to report with each token's log-probability; None to report nothing.
        grammar: compiled grammar that the text must follow (behind the thinking, if it starts in it), or None.
        parts: how to tell thinking and tool calls from the answer; None to take the whole text as the answer.
        ignored: names of the fields that had no effect, since nobody here knows them.
        notes: what else had no effect, in words.
        marks: whether pieces say who drafted them.
        plain: whether to decode plainly, whatever the server's layout.
        ends: lengths of the prompt at which messages end, where another prompt may go on in another way.
    """

    prompt: list[int]
    max_tokens: int
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    stop: tuple[str, ...] = ()
    top_logprobs: int | None = None
    grammar: str | None = None
    parts: PartsSettings | None = None
    ignored: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    marks: bool = False
    plain: bool = False
    ends: tuple[int, ...] = ()


@dataclass(frozen=True)
class Mark:
    """Where a token came from.

    Attributes:
        drafter: who drafted it; "" if nobody did.
        depth: index of the draft in its step, from 1; 0 if nobody drafted it.
        steps, tokens: of the text so far.
        written_in: seconds since the first token.
        acceptance: so far, by depth: the share of accepted drafts among those that were reached, or None.
    """

    drafter: str
    depth: int
    steps: int
    tokens: int
    written_in: float
    acceptance: tuple[float | None, ...]


@dataclass(frozen=True)
class TokenLogprob:
    """A token and its log-probability under the model, before temperature, warping, penalties and grammar.

    Attributes:
        top: the most likely tokens at this position as (id, log-probability), most likely first.
    """

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...]


@dataclass(frozen=True)
class Summary:
    """What is reported at the end of a text.

    Attributes:
        finish_reason: "stop", "length", or "tool_calls" if it stopped after a tool call.
        stop: the stop string that ended it, or None.
        prompt_tokens, cached_tokens: length of the prompt, and how much of it came from the prefix cache.
        generation_tokens: tokens written, including an end-of-text token.
        mtp: counts of the decoding loop, as JSON values.
    """

    finish_reason: str
    stop: str | None
    prompt_tokens: int
    cached_tokens: int
    generation_tokens: int
    mtp: dict[str, Any]


@dataclass(frozen=True)
class Piece:
    """What one token adds to the text.

    Attributes:
        text: the text of the answer that this token completes; may be empty.
        logprob: of the token, if requested.
        summary: None before the last piece.
        thinking: the same for thinking.
        calls: tool calls that it completes.
        mark: where the token came from, if requested.
    """

    text: str
    logprob: TokenLogprob | None = None
    summary: Summary | None = None
    thinking: str = ""
    calls: tuple[ToolCall, ...] = ()
    mark: Mark | None = None


@dataclass(frozen=True)
class Failure:
    """The text ends here because of an error."""

    error: RequestError


Event = Piece | Failure
