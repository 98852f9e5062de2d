"""What the engine is asked and what it answers, whatever HTTP interface is in front of it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from mtp_mlx.decode.pick import SamplingConfig


class RequestError(Exception):
    """A request that is not served: one sentence for the client.

    Attributes:
        status: HTTP status.
        field: the field of the request that is wrong, or None.
    """

    def __init__(self, message: str, status: int = 400, field: str | None = None) -> None:
        super().__init__(message)
        self.message, self.status, self.field = message, status, field


@dataclass(frozen=True)
class GenerationRequest:
    """One text to write.

    Attributes:
        prompt: token ids.
        max_tokens: exactly so many at most, from 1.
        sampling: how tokens are picked, seed included.
        stop: strings that end the text; they are not part of it.
        top_logprobs: how many alternatives to report with each token's log-probability; None for no report.
        grammar: compiled grammar that the text must follow, or None.
    """

    prompt: list[int]
    max_tokens: int
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    stop: tuple[str, ...] = ()
    top_logprobs: int | None = None
    grammar: str | None = None


@dataclass(frozen=True)
class TokenLogprob:
    """A token and its log-probability under the model, before temperature, warps, penalties and grammar.

    Attributes:
        top: the likeliest tokens at this position, likeliest first, as (id, log-probability).
    """

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...]


@dataclass(frozen=True)
class Summary:
    """What there is to say at the end of a text.

    Attributes:
        finish_reason: "stop" or "length".
        stop: the stop string that ended it, or None.
        prompt_tokens, cached_tokens: of the prompt; of these, how many came from the prefix cache.
        generation_tokens: tokens written, an end-of-text token included.
        mtp: counts of decoding, JSON values.
    """

    finish_reason: str
    stop: str | None
    prompt_tokens: int
    cached_tokens: int
    generation_tokens: int
    mtp: dict[str, Any]


@dataclass(frozen=True)
class Piece:
    """One token's share of the text.

    Attributes:
        text: became final with this token; may be empty.
        logprob: of the token, where it was asked for.
        summary: None before the last piece.
    """

    text: str
    logprob: TokenLogprob | None = None
    summary: Summary | None = None


@dataclass(frozen=True)
class Failure:
    """The text ends here, by no wish of the client."""

    error: RequestError


Event = Piece | Failure
