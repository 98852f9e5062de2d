"""One request being answered: prompt, decoding, text. Used only on the engine's thread."""

from __future__ import annotations

import time
from collections.abc import Generator, Iterable
from dataclasses import dataclass
from typing import Any, cast

import mlx.core as mx
from mlx_lm.tokenizer_utils import TokenizerWrapper

from mtp_mlx.answer_parts import AnswerParts, Parts
from mtp_mlx.decode.constraint import Constraint
from mtp_mlx.decode.led import led_policy
from mtp_mlx.decode.loop import DecodeLoop, open_loop
from mtp_mlx.decode.policy import LayoutName
from mtp_mlx.decode.session import CacheSettings
from mtp_mlx.decode.stats import DecodeStats
from mtp_mlx.decode.step import Token
from mtp_mlx.distributed import Peers
from mtp_mlx.files import warn_once
from mtp_mlx.model.attach import AttachedModel
from mtp_mlx.model.context import beyond_context
from mtp_mlx.planning.choose import plan_drafting
from mtp_mlx.serve.prefix_cache import PrefixCache
from mtp_mlx.serve.request import GenerationRequest, Mark, Piece, Summary, TokenLogprob
from mtp_mlx.text import AnswerText


@dataclass(frozen=True)
class DecodeSettings:
    """How requests are decoded; fields as in `mtp_mlx.api.stream_generate` and mlx-lm."""

    layout: LayoutName = "auto"
    drafts: int | None = None
    lookup: bool | None = None
    drafter: str | None = None
    rows: int | None = None
    kv_bits: int | None = None
    kv_group_size: int = 64
    quantized_kv_start: int = 5000
    prefill_step_size: int = 512

    @property
    def cache(self) -> CacheSettings:
        """The settings of the KV cache."""
        return CacheSettings(
            self.kv_bits, self.kv_group_size, self.quantized_kv_start, self.prefill_step_size
        )


class Sequence:
    """One text being written.

    Args:
        model, tokenizer: from `mtp_mlx.load`.
        request: what to write.
        settings: how to decode.
        prefixes: may hold a prefix of the prompt; receives the KV cache at the end.
        constraint: the request's grammar, or None.
        shared_drafts: most drafts that shared passes may ask of the model's own drafter.

    Attributes:
        loop: the decoding loop.
        done: whether the last piece has been returned.
        batched_steps: steps shared with other sequences.

    Raises:
        MTPError: if the model or its adapter does not support the prompt or the sampling.
    """

    def __init__(
        self,
        model: AttachedModel,
        tokenizer: TokenizerWrapper,
        request: GenerationRequest,
        settings: DecodeSettings,
        prefixes: PrefixCache,
        constraint: Constraint | None = None,
        shared_drafts: int = 0,
    ) -> None:
        self.request = request
        self.stats = DecodeStats()
        self._note_context(beyond_context(model.model, len(request.prompt)))
        drafting = plan_drafting(
            model,
            "plain" if request.plain else settings.layout,
            None if request.plain else settings.drafts,
            self.stats,
            None if request.plain else settings.lookup,
            None if request.plain else settings.drafter,
            rows=None if request.plain else settings.rows,
        )
        self.policy = led_policy(drafting.policy, model.peers)
        self._prefixes, self._texts = prefixes, model.text_source
        cache, self.n_cached = self._fetch(model.peers)
        self.cache: list[Any] = model.make_cache() if cache is None else cache
        self.session, loop = open_loop(
            request.prompt[self.n_cached :],
            model,
            max_tokens=request.max_tokens,
            sampling=request.sampling,
            policy=self.policy,
            lookup=drafting.lookup,
            emission=None,
            cache=self.cache,
            settings=settings.cache,
            stats=self.stats,
            constraint=constraint,
            prefix=request.prompt[: self.n_cached],
            shared_drafts=shared_drafts,
        )
        assert isinstance(loop, DecodeLoop)
        self.loop = loop
        self._ends: list[tuple[int, list[Any]]] = []  # (tokens, copies of the states behind them)
        ends = request.ends if prefixes.wants_ends(self.cache) else ()
        self._to_keep = [end - self.n_cached for end in ends if self.n_cached < end < len(request.prompt)]
        self._chunks = self.session.prefill_chunks(ends=self._to_keep)
        self._tokens: Generator[Token, None, None] | None = None
        self._text = AnswerText(tokenizer, request.stop, request.max_tokens, self.stats.fallbacks)
        self._parts = None
        if request.parts is not None:
            self._parts = AnswerParts(tokenizer, request.parts, self.stats.fallbacks)
        ignored = [f"the field {name!r} is not known here and had no effect" for name in request.ignored]
        self.stats.fallbacks.update([*ignored, *request.notes])
        self._started, self._first = time.perf_counter(), 0.0
        self.done = False
        self.batched_steps = 0

    def _fetch(self, peers: Peers) -> tuple[list[Any] | None, int]:
        """(the cache of the longest known prefix, its length), or (None, 0)."""
        # Penalties look at the last tokens of the prompt, so these are always processed again.
        spare = max(1, self.request.sampling.history_size)
        cache, length = self._prefixes.fetch(self.request.prompt, spare)
        if len(set(peers.gather(length))) > 1:  # each process has room for its own part only
            return None, 0
        return cache, length

    def _note_context(self, note: str | None) -> None:
        """Notes that the prompt is longer than the model's context; the operator is told of the first such one."""
        if note:
            self.stats.notes.append(note)
            warn_once(
                "context", f"{note} (said of the first such request; the others have it in `mtp.notes`)"
            )

    def prefill(self) -> bool:
        """Process the next chunk of the prompt; True if there was none left."""
        done = next(self._chunks, None)
        if done in self._to_keep:
            self._ends.append((self.n_cached + done, self.session.copied_states()))
        return done is None

    def advance(self) -> list[Piece]:
        """The next token; runs a decoding step if none is left from the last one."""
        if self._tokens is None:
            self._tokens = self.loop.tokens()
        token = next(self._tokens, None)
        return [] if token is None else self.take([token])

    def take(self, tokens: Iterable[Token]) -> list[Piece]:
        """The pieces of committed tokens, up to the end of the text."""
        pieces = []
        for token in tokens:
            pieces.append(self._piece(token))
            if self.done:
                break
        return pieces

    def pause(self) -> list[Piece]:
        """Stop decoding alone, between two steps, so that the next can be shared; `advance` continues alone."""
        if self._tokens is None:
            return []
        self.loop.leaving = True
        pieces = self.take(self._tokens)
        self._tokens.close()
        self._tokens, self.loop.leaving = None, False
        return pieces

    def finish(self) -> None:
        """End the sequence and store its keys and values in the prefix cache."""
        if self._tokens is not None:
            self._tokens.close()
        n_own = len(self.request.prompt) - self.n_cached + self._text.count
        if self._texts is not None:
            self._texts.learn(self.request.prompt, self.session.generated[: self._text.count])
        kept = min(n_own, self.session.cached - self.session.start)  # the last token may not be in the cache
        self.session.settle(kept)
        said = (self.request.prompt + self.session.generated)[: self.n_cached + kept]
        self._prefixes.store(said, self.cache, self._ends)

    def drop(self) -> None:
        """End the sequence without keeping anything."""
        if self._tokens is not None:
            self._tokens.close()
        self.cache.clear()
        self._ends.clear()

    def _piece(self, token: Token) -> Piece:
        text, reason = self._text.feed(token.token)
        parts = Parts(text) if self._parts is None else self._parts.feed(text, reason)
        if self.n_calls and reason != "length":
            assert self.request.parts is not None
            if reason == "stop" or not self.request.parts.parallel:
                reason = "tool_calls"
        summary = None
        if reason is not None:
            self.done = True
            self.stats.verdict = self.policy.verdict
            summary = self._summary(reason)
        return Piece(
            parts.text, self._logprob(token), summary, parts.thinking, parts.calls, self._mark(token)
        )

    def _mark(self, token: Token) -> Mark | None:
        """Where a token came from, if that was asked for."""
        if not self.request.marks:
            return None
        now = time.perf_counter()
        self._first = self._first or now
        rates = tuple(None if rate is None else round(rate, 4) for rate in self.stats.acceptance)
        return Mark(
            drafter=token.drafter,
            depth=token.depth,
            steps=self.stats.steps,
            tokens=self._text.count,
            written_in=round(now - self._first, 4),
            acceptance=rates,
        )

    @property
    def n_calls(self) -> int:
        """Tool calls so far."""
        return 0 if self._parts is None else self._parts.n_calls

    def _logprob(self, token: Token) -> TokenLogprob | None:
        count = self.request.top_logprobs
        if count is None:
            return None
        logits = token.logits.astype(mx.float32)
        logprobs = logits - mx.logsumexp(logits)
        own = cast(float, logprobs[token.token].item())
        if not count:
            return TokenLogprob(token.token, own, ())
        ids = mx.argpartition(-logprobs, kth=count - 1)[:count]
        found = zip(cast("list[int]", ids.tolist()), cast("list[float]", logprobs[ids].tolist()))
        pairs = sorted(found, key=lambda pair: (-pair[1], pair[0]))
        return TokenLogprob(token.token, own, tuple(pairs))

    def _summary(self, reason: str) -> Summary:
        counts = self.stats.to_json()
        mtp = {
            name: counts[name]
            for name in (
                "tokens_per_step",
                "rows_per_step",
                "steps",
                "acceptance",
                "drafted_by",
                "fallbacks",
                "notes",
            )
        }
        sampling = self.request.sampling
        mtp |= {
            "lossless": counts["lossless"],
            "verdict": counts["verdict"],
            "batched_steps": self.batched_steps,
            "seconds": round(time.perf_counter() - self._started, 3),
            "seed": sampling.seed,
            "temperature": sampling.temperature,
        }
        return Summary(
            finish_reason=reason,
            stop=self._text.stops.found,
            prompt_tokens=len(self.request.prompt),
            cached_tokens=self.n_cached,
            generation_tokens=self._text.count,
            mtp=mtp,
        )
