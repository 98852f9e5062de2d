"""`batch_generate`: texts of several prompts at once, called as mlx-lm's function of that name.

Texts share forward passes, each with its own drafts (`mtp_mlx.serve.batch`), and a text that ends makes room for the
next prompt. Each is the text that `generate` writes for its prompt alone, up to rounding: rows of a padded batch may
be added up in another order, and where two tokens nearly tie the other one may win. Models whose passes cannot be
shared write one text after the other, which is said once and counted.
"""

from __future__ import annotations

import copy
import time
from collections import deque
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any, cast

import mlx.core as mx
from mlx_lm.generate import wired_limit
from mlx_lm.models.cache import KVCache
from mlx_lm.tokenizer_utils import TokenizerWrapper

from mtp_mlx.api import checked_names
from mtp_mlx.decode.constraint import LogitsProcessor
from mtp_mlx.decode.loop import DecodeLoop, open_loop
from mtp_mlx.decode.pick import SamplingConfig
from mtp_mlx.decode.policy import LayoutName
from mtp_mlx.decode.session import CacheSettings
from mtp_mlx.decode.stats import DecodeStats
from mtp_mlx.decode.step import Token
from mtp_mlx.errors import MTPError
from mtp_mlx.files import warn_once
from mtp_mlx.model.attach import AttachedModel
from mtp_mlx.model.context import beyond_context
from mtp_mlx.planning.calibrate import step_cost
from mtp_mlx.planning.choose import plan_drafting, recorded_acceptance
from mtp_mlx.prompt_ids import Prompt
from mtp_mlx.serve.batch import Batch, why_not_batch
from mtp_mlx.serve.batch_plan import BatchPlan, batch_drafting
from mtp_mlx.serve.batch_texts import BatchResponse, BatchStats, Wanted, wanted_texts
from mtp_mlx.token_ids import text_of


@dataclass(frozen=True)
class _Drafting:
    """How texts are drafted; fields as the arguments of `batch_generate`."""

    layout: LayoutName
    drafts: int | None
    lookup: bool | None
    drafter: str | None
    prefill_step_size: int
    processors: Sequence[LogitsProcessor]


class _Text:
    """One text being written.

    Attributes:
        session, loop: its decoding.
        policy: of its drafts while it is alone.
        ids, logprobs: so far, without the token that ends it.
        count: tokens so far, that one included.
        done: whether it has ended.
    """

    def __init__(
        self, model: AttachedModel, wanted: Wanted, how: _Drafting, shared: int, ends: set[int]
    ) -> None:
        self.stats = DecodeStats()
        if note := beyond_context(model.model, len(wanted.ids)):
            self.stats.notes.append(note)
        drafting = plan_drafting(
            model, how.layout, how.drafts, self.stats, how.lookup, how.drafter, max_tokens=wanted.max_tokens
        )
        self.session, loop = open_loop(
            wanted.ids,
            model,
            max_tokens=wanted.max_tokens,
            sampling=wanted.sampling,
            policy=drafting.policy,
            lookup=drafting.lookup,
            emission=None,
            cache=model.make_cache() if wanted.cache is None else copy.deepcopy(wanted.cache),
            settings=CacheSettings(prefill_step_size=how.prefill_step_size),
            stats=self.stats,
            constraint=None,
            processors=how.processors,
            shared_drafts=shared,
        )
        assert isinstance(loop, DecodeLoop)
        self.loop, self.policy = loop, drafting.policy
        self._wanted, self._ends = wanted, ends
        self.ids: list[int] = []
        self.logprobs: list[float] = []
        self.count, self.done = 0, False

    def take(self, token: Token, logprobs: bool) -> None:
        """Adds a token, unless the text has ended before it."""
        if self.done:
            return
        self.count += 1
        self.done = token.token in self._ends or self.count == self._wanted.max_tokens
        if token.token in self._ends:
            return
        self.ids.append(token.token)
        if logprobs:
            logits = token.logits.astype(mx.float32)
            self.logprobs.append(cast(float, (logits[token.token] - mx.logsumexp(logits)).item()))

    def settled_cache(self) -> list[Any]:
        """The prompt cache, which then holds the prompt and everything written; ends the session."""
        self.session.settle(len(self._wanted.ids) + self.count)
        return self.session.cache


def batch_generate(
    model: AttachedModel,
    tokenizer: TokenizerWrapper,
    prompts: Sequence[Prompt],
    prompt_caches: Sequence[list[Any] | None] | None = None,
    max_tokens: int | Sequence[int] = 128,
    verbose: bool = False,
    return_prompt_caches: bool = False,
    return_token_ids: bool = False,
    return_logprobs: bool = False,
    *,
    sampling: SamplingConfig | Sequence[SamplingConfig] | None = None,
    layout: LayoutName = "auto",
    drafts: int | None = None,
    lookup: bool | None = None,
    drafter: str | None = None,
    logits_processors: Sequence[LogitsProcessor] = (),
    completion_batch_size: int = 32,
    prefill_step_size: int = 2048,
    **kwargs: Any,
) -> BatchResponse:
    """Writes the texts of several prompts, in shared forward passes.

    Each is the text that its prompt has alone, except where two tokens nearly tie: padding changes rounding.

    Args:
        prompts: token ids or a text for each, as for `stream_generate`.
        prompt_caches: for each prompt a cache of what comes before it, or None. They are not changed.
        max_tokens: most tokens of a text; one number, or one for each prompt. -1 for no limit.
        verbose: print progress and speed to stdout, as mlx-lm does.
        return_prompt_caches, return_token_ids, return_logprobs: what the response has besides texts.
        sampling: how tokens are picked; one for all prompts, or one for each.
        layout, drafts, lookup, drafter, logits_processors: as for `stream_generate`.
        completion_batch_size: most texts written at once; prompts are read one by one.
        prefill_step_size: tokens of a prompt in a pass.

    Raises:
        MTPError: as `stream_generate`, or if there are not as many of something as prompts.
    """
    checked_names(kwargs, _KEYWORDS)
    tokenizer = tokenizer if isinstance(tokenizer, TokenizerWrapper) else TokenizerWrapper(tokenizer)
    if not model.peers.alone:
        raise MTPError("batch_generate needs a single process: run it without mlx.launch")
    if completion_batch_size < 1:
        raise MTPError(f"`completion_batch_size` must be at least 1; got {completion_batch_size}")
    wanted = wanted_texts(model, tokenizer, prompts, prompt_caches, max_tokens, sampling)
    how = _Drafting(layout, drafts, lookup, drafter, prefill_step_size, logits_processors)
    writer = _Writer(
        model, tokenizer, how, completion_batch_size, return_logprobs, return_prompt_caches, verbose
    )
    texts = writer.write(wanted)
    if verbose:
        _report(writer.stats)
    return BatchResponse(
        [text_of(tokenizer, text.ids) for text in texts],
        writer.stats,
        [writer.caches[id(text)] for text in texts] if return_prompt_caches else None,
        [text.ids for text in texts] if return_token_ids else None,
        [text.logprobs for text in texts] if return_logprobs else None,
    )


# Names that an unknown one may be meant for.
_KEYWORDS = {
    "sampling",
    "layout",
    "drafts",
    "lookup",
    "drafter",
    "logits_processors",
    "completion_batch_size",
}


class _Writer:
    """Writes texts, several at once where passes can be shared.

    Attributes:
        stats: of all texts.
        caches: by the `id` of a text, if wanted.
    """

    def __init__(
        self,
        model: AttachedModel,
        tokenizer: TokenizerWrapper,
        how: _Drafting,
        most: int,
        logprobs: bool,
        keep: bool,
        verbose: bool,
    ) -> None:
        self._model, self._how, self._most, self._logprobs = model, how, most, logprobs
        self._ends = set(tokenizer.eos_token_ids)
        self._keep, self._verbose = keep, verbose
        self.stats = BatchStats()
        self.caches: dict[int, list[Any]] = {}
        self._ended = self._of = 0

    def write(self, wanted: list[Wanted]) -> list[_Text]:
        """The texts, in the order of the prompts."""
        started = time.perf_counter()
        self._of = len(wanted)
        self._say()
        batch, reason = self._batch(len(wanted))
        with wired_limit(self._model.model):
            texts = self._in_turn(wanted, reason) if batch is None else self._together(wanted, batch)
        self.stats.wall_time = time.perf_counter() - started
        self.stats.peak_memory = mx.get_peak_memory() / 1e9
        self.stats.texts = [text.stats for text in texts]
        return texts

    def _in_turn(self, wanted: list[Wanted], reason: str) -> list[_Text]:
        """The texts, written one after the other for a reason, which is "" for a single one."""
        texts = []
        for one in wanted:
            text = self._begun(one, shared=0)
            if reason:
                text.stats.fallbacks[reason] += 1
            self._finish_alone(text)
            texts.append(text)
        return texts

    def _together(self, wanted: list[Wanted], batch: Batch) -> list[_Text]:
        """The texts, written in shared passes."""
        texts, waiting, sharing = (
            list[_Text](),
            deque(wanted),
            dict[int, _Text](),
        )  # by the `id` of the member
        while waiting or sharing:
            while waiting and len(sharing) < self._most:
                text = self._begun(waiting.popleft(), batch.own_drafts)
                texts.append(text)
                if all(type(layer) is KVCache for layer in text.session.cache):
                    sharing[id(batch.join(text.session, text.loop))] = text
                else:  # the prompt cache that it was given is quantised
                    text.stats.fallbacks["alone: the rows of its prompt cache cannot be rolled"] += 1
                    self._finish_alone(text)
            if len(sharing) == 1 and not waiting:
                (text,) = sharing.values()
                batch.leave(batch.members[0])
                self._finish_alone(text)
                return texts
            if sharing:
                self._step(batch, sharing)
        return texts

    def _step(self, batch: Batch, sharing: dict[int, _Text]) -> None:
        """One shared pass; texts that end leave the batch."""
        members = list(batch.members)
        self.stats.generation_steps += 1
        for member, tokens in zip(members, batch.step(), strict=True):
            text = sharing[id(member)]
            for token in tokens:
                text.take(token, self._logprobs)
            if text.done:
                (batch.leave if self._keep else batch.forget)(member)
                del sharing[id(member)]
                self._end(text)

    def _batch(self, n_prompts: int) -> tuple[Batch | None, str]:
        """(the batch in which texts share passes, why there is none), or (None, "") for a single text."""
        if n_prompts < 2 or self._most < 2:
            return None, ""
        if reason := why_not_batch(self._model):
            reason = f"one text after the other, instead of shared passes: {reason}"
            warn_once("batch_generate", reason)
            return None, reason
        how = self._how
        drafting = batch_drafting(self._model, how.layout, how.drafts, how.lookup, how.drafter)
        cost = step_cost(self._model) if drafting.form == "auto" else None
        if cost is not None:
            recorded_acceptance(self._model)  # fills model.experience
        return Batch(self._model, BatchPlan(drafting, cost, self._model.experience)), ""

    def _begun(self, wanted: Wanted, shared: int) -> _Text:
        """A text whose prompt has been read."""
        started = time.perf_counter()
        text = _Text(self._model, wanted, self._how, shared, self._ends)
        text.session.prefill()
        self.stats.prompt_time += time.perf_counter() - started
        self.stats.prompt_tokens += len(wanted.ids)
        return text

    def _finish_alone(self, text: _Text) -> None:
        """Writes the rest of a text in passes of its own."""
        steps = text.stats.steps
        with closing(text.loop.tokens()) as tokens:
            for token in tokens:
                text.take(token, self._logprobs)
                if text.done:
                    break
        self.stats.generation_steps += text.stats.steps - steps
        self._end(text)

    def _end(self, text: _Text) -> None:
        text.stats.verdict = text.policy.verdict
        if self._keep:
            self.caches[id(text)] = text.settled_cache()
        else:
            text.session.cache.clear()
        self.stats.generation_tokens += text.count
        self._ended += 1
        self._say()
        mx.clear_cache()

    def _say(self) -> None:
        if self._verbose:
            end = "\n" if self._ended == self._of else "\r"
            print(f"[batch_generate] Finished processing {self._ended}/{self._of} ...", end=end, flush=True)


def _report(stats: BatchStats) -> None:
    for name, count, rate in (
        ("Prompt", stats.prompt_tokens, stats.prompt_tps),
        ("Generation", stats.generation_tokens, stats.generation_tps),
    ):
        print(f"[batch_generate] {name}: {count} tokens, {rate:.3f} tokens-per-sec")
    print(f"[batch_generate] Peak memory: {stats.peak_memory:.3f} GB")
