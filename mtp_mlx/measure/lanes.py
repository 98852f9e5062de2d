"""Runs plain mlx-lm and mtp-mlx on the same weights and prompts, alternating in one process.

Speed counts the tokens and the time after the first step, so prefill and the first token count for neither side.
mlx-lm runs on the bare model, with the wrappers taken off.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from typing import Any

import mlx.core as mx
from mlx_lm.generate import generate_step
from mlx_lm.tokenizer_utils import TokenizerWrapper

from mtp_mlx.api import chat_prompt
from mtp_mlx.decode.emission import Emission
from mtp_mlx.decode.loop import mtp_generate_step
from mtp_mlx.decode.policy import LayoutName
from mtp_mlx.decode.stats import DecodeStats
from mtp_mlx.measure.certificate import Comparison, compare
from mtp_mlx.measure.prompts import Prompt
from mtp_mlx.model.attach import AttachedModel
from mtp_mlx.model.context import warn_beyond
from mtp_mlx.planning.choose import plan_drafting
from mtp_mlx.token_ids import check_ids


@dataclass(frozen=True)
class Lane:
    """One way of generating: mlx-lm itself (layout None), or mtp-mlx with these arguments of `stream_generate`."""

    name: str
    layout: LayoutName | None = None
    drafts: int | None = None
    lookup: bool | None = None
    emission: Emission = Emission()
    drafter: str | None = None
    rows: int | None = None


@dataclass
class Timed:
    """One generation: its ids, and the number of tokens and the seconds after its first step."""

    tokens: list[int]
    timed_tokens: int
    seconds: float
    stats: DecodeStats = field(default_factory=DecodeStats)


@dataclass
class Measurement:
    """One prompt in one lane, compared with plain mlx-lm on the same prompt; `prompt_tokens` is its length."""

    prompt: Prompt
    lane: Lane
    timed: Timed
    reference: Timed
    comparison: Comparison
    prompt_tokens: int = 0

    @property
    def refused(self) -> bool:
        """The lane is verified and its text still differs by more than a near-tie, so its speed does not count."""
        same = self.comparison.identical or self.comparison.certified
        return self.lane.emission.lossless and not same


class Bench:
    """Measures prompts in several lanes.

    Args:
        model, tokenizer: from `mtp_mlx.load`.
        lanes: of mtp-mlx; plain mlx-lm is always measured too.
        max_tokens: per prompt.
    """

    def __init__(
        self, model: AttachedModel, tokenizer: TokenizerWrapper, lanes: Sequence[Lane], max_tokens: int
    ) -> None:
        self._model, self._tokenizer, self._max_tokens = model, tokenizer, max_tokens
        self.lanes = list(lanes)

    def warm_up(self) -> None:
        """One short generation per lane, not counted. It also measures the costs that "auto" plans with."""
        prompt = self._ids("Hello")
        for lane in [Lane("mlx-lm"), *self.lanes]:
            self._generate(lane, prompt, 12)

    def run(
        self,
        prompts: Sequence[Prompt],
        on_prompt: Callable[[int, list[Measurement]], None] | None = None,
    ) -> list[Measurement]:
        """Every prompt in every lane. The order of the lanes rotates from prompt to prompt."""
        results: list[Measurement] = []
        for index, prompt in enumerate(prompts):
            ids = self._ids(prompt.text)
            order = [Lane("mlx-lm"), *self.lanes]
            shift = index % len(order)
            timed = {
                lane.name: self._generate(lane, ids, self._max_tokens)
                for lane in order[shift:] + order[:shift]
            }
            reference = timed["mlx-lm"]
            rows = []
            for lane in self.lanes:
                with self._model.unwrapped() as bare:
                    comparison = compare(bare, ids, reference.tokens, timed[lane.name].tokens)
                if self._model.exact:  # the promise is the very text, near-ties included
                    comparison = replace(comparison, bound=0.0)
                rows.append(Measurement(prompt, lane, timed[lane.name], reference, comparison, len(ids)))
            results += rows
            if on_prompt is not None:
                on_prompt(index, rows)
        return results

    def _ids(self, text: str) -> list[int]:
        """Ids of a user's message; checked here, since mlx-lm checks nothing."""
        ids = chat_prompt(self._tokenizer, text)
        check_ids(ids, self._model.vocab_size, "the prompt", self._tokenizer)
        warn_beyond(self._model.model, len(ids))
        return ids

    def _generate(self, lane: Lane, ids: list[int], max_tokens: int) -> Timed:
        return self._plain(ids, max_tokens) if lane.layout is None else self._drafted(lane, ids, max_tokens)

    def _plain(self, ids: list[int], max_tokens: int) -> Timed:
        with self._model.unwrapped() as bare:
            steps = generate_step(mx.array(ids), bare, max_tokens=max_tokens)
            return self._timed((int(token) for token, _ in steps), steps, lambda: 1)

    def _drafted(self, lane: Lane, ids: list[int], max_tokens: int) -> Timed:
        assert lane.layout is not None
        stats = DecodeStats()
        drafting = plan_drafting(
            self._model,
            lane.layout,
            lane.drafts,
            stats,
            lane.lookup,
            lane.drafter,
            lane.emission,
            rows=lane.rows,
        )
        steps = mtp_generate_step(
            ids,
            self._model,
            max_tokens=max_tokens,
            policy=drafting.policy,
            lookup=drafting.lookup,
            emission=lane.emission,
            stats=stats,
        )
        timed = self._timed((item.token for item in steps), steps, lambda: stats.tokens)
        timed.stats = stats
        return timed

    def _timed(self, tokens: Any, generator: Any, first_step: Callable[[], int]) -> Timed:
        """Consumes `tokens` up to an end-of-text token. `first_step` says how many the first step gave."""
        out: list[int] = []
        started = in_first = 0.0
        skipped = 0
        with closing(generator):
            for token in tokens:
                if not out:
                    started, skipped = time.perf_counter(), first_step()
                out.append(token)
                if token in self._tokenizer.eos_token_ids:
                    break
            in_first = time.perf_counter()
        return Timed(out, max(len(out) - skipped, 0), in_first - started)
