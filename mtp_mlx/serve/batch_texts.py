"""What `batch_generate` is asked for, and what it returns."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from mlx_lm.tokenizer_utils import TokenizerWrapper

from mtp_mlx.decode.pick import SamplingConfig
from mtp_mlx.decode.stats import DecodeStats
from mtp_mlx.errors import MTPError
from mtp_mlx.model.attach import AttachedModel
from mtp_mlx.prompt_ids import Prompt, encode_prompt
from mtp_mlx.token_ids import check_ids

Value = TypeVar("Value")


@dataclass
class BatchStats:
    """What a call did. Names are mlx-lm's.

    Attributes:
        prompt_tokens, generation_tokens: tokens read and written, those that end a text included.
        generation_steps: forward passes after the prompts.
        prompt_time, wall_time: seconds for the prompts, and for everything.
        peak_memory: GB.
        texts: counts of decoding, one for each prompt.
    """

    prompt_tokens: int = 0
    generation_tokens: int = 0
    generation_steps: int = 0
    prompt_time: float = 0.0
    wall_time: float = 0.0
    peak_memory: float = 0.0
    texts: list[DecodeStats] = field(default_factory=list)

    @property
    def prompt_tps(self) -> float:
        """Tokens of prompts per second."""
        return self.prompt_tokens / self.prompt_time if self.prompt_time else 0.0

    @property
    def generation_time(self) -> float:
        """Seconds after the prompts."""
        return max(0.0, self.wall_time - self.prompt_time)

    @property
    def generation_tps(self) -> float:
        """Tokens written per second, of all texts together."""
        return self.generation_tokens / self.generation_time if self.generation_time else 0.0


@dataclass
class BatchResponse:
    """The texts of several prompts, in the order of the prompts. Names are mlx-lm's.

    Attributes:
        texts: what the model wrote, decoded as a whole, without the token that ends a text.
        stats: counts and times.
        caches: a prompt cache for each, which holds its prompt and everything written; None unless asked for.
        token_ids: ids of each text; None unless asked for.
        logprobs: log-probabilities of these ids under the model; None unless asked for.
    """

    texts: list[str]
    stats: BatchStats
    caches: list[list[Any]] | None = None
    token_ids: list[list[int]] | None = None
    logprobs: list[list[float]] | None = None


@dataclass(frozen=True)
class Wanted:
    """One prompt, and what is wanted of its text."""

    ids: list[int]
    max_tokens: int
    sampling: SamplingConfig
    cache: list[Any] | None


def wanted_texts(
    model: AttachedModel,
    tokenizer: TokenizerWrapper,
    prompts: Sequence[Prompt],
    caches: Sequence[list[Any] | None] | None,
    max_tokens: int | Sequence[int],
    sampling: SamplingConfig | Sequence[SamplingConfig] | None,
) -> list[Wanted]:
    """The prompts with what is wanted of each.

    Raises:
        MTPError: see `batch_generate`.
    """
    if isinstance(prompts, str) or not isinstance(prompts, Sequence):
        raise MTPError("`prompts` must be a list of prompts: for a single one, use `generate`")
    n = len(prompts)
    lengths = [max_tokens] * n if isinstance(max_tokens, int) else _each("max_tokens", max_tokens, n)
    before = [None] * n if caches is None else _each("prompt_caches", caches, n)
    alike = SamplingConfig() if sampling is None else sampling
    picks = [alike] * n if isinstance(alike, SamplingConfig) else _each("sampling", alike, n)
    for value in lengths:
        if not isinstance(value, int) or value == 0 or value < -1:
            raise MTPError(f"`max_tokens` must be at least 1, or -1 for no limit; got {value}")
    return [
        Wanted(_ids(model, tokenizer, prompt, f"`prompts`[{number}]"), length, pick, cache)
        for number, (prompt, length, pick, cache) in enumerate(
            zip(prompts, lengths, picks, before, strict=True)
        )
    ]


def _each(name: str, values: Sequence[Value], n_prompts: int) -> list[Value]:
    """The values as a list; MTPError unless there is one for each prompt."""
    if len(values) != n_prompts:
        raise MTPError(f"`{name}` has {len(values)} values for {n_prompts} prompts: give one for each")
    return list(values)


def _ids(model: AttachedModel, tokenizer: TokenizerWrapper, prompt: Prompt, what: str) -> list[int]:
    """Token ids of a prompt; MTPError if there are none, or one that the model has no row for."""
    ids = encode_prompt(tokenizer, prompt)
    if not ids:
        raise MTPError(f"{what} is empty: give at least one token")
    check_ids(ids, model.vocab_size, what, tokenizer)
    return ids
