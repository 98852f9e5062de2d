"""Prompts answered in several lanes: speed, acceptance, agreement, perplexity, right answers.

Lane "plain" is ordinary greedy decoding and always measured. A verified lane writes the same text faster; a lossy one
(unverified emission) may write another, and what that costs is measured against the plain lane's answers and against
the model's own next-token path (`own_path`).
"""

from __future__ import annotations

import hashlib
import json
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from mlx_lm.tokenizer_utils import TokenizerWrapper

from mtp_mlx.api import chat_prompt, encode_prompt, stream_generate
from mtp_mlx.decode.stats import DecodeStats
from mtp_mlx.errors import MTPError
from mtp_mlx.measure.kept import KeptRows
from mtp_mlx.measure.lanes import Lane
from mtp_mlx.measure.prompts import Prompt
from mtp_mlx.measure.tau_sweep import own_path
from mtp_mlx.model.attach import AttachedModel
from mtp_mlx.model.context import warn_beyond

PLAIN = Lane("plain", "plain")


@dataclass(frozen=True)
class Answer:
    """One prompt in one lane.

    Attributes:
        lane, task, category: names of the lane, the prompt and its category.
        tokens, passes: tokens written, and the forward passes this took.
        timed_tokens, seconds: after the first step, so that prefill counts for no lane.
        submitted, accepted: drafts per depth that verification reached, and accepted; empty if nothing is verified.
        agreeing: tokens that the model's own path would have picked there.
        nll: summed negative log-likelihood of the tokens under that path, in nats.
        same: the text is the plain lane's.
        right: None if the right answer is not known.
        lossless: every token was verified.
        text: what was written.
    """

    lane: str
    task: str
    category: str
    tokens: int
    passes: int
    timed_tokens: int
    seconds: float
    submitted: list[int]
    accepted: list[int]
    agreeing: int
    nll: float
    same: bool
    right: bool | None
    lossless: bool
    text: str


@dataclass(frozen=True)
class EvaluationSettings:
    """`max_tokens`: of an answer. `raw`: continue the prompts as they are, without the chat template."""

    max_tokens: int
    raw: bool = False


class Evaluation:
    """Every prompt in every lane, the plain one first.

    Args:
        model, tokenizer: from `mtp_mlx.load`.
        prompts: with unique names.
        lanes: besides the plain one, with unique names.
        settings: see `EvaluationSettings`.
        out: JSONL file that keeps every answer, so that the next run resumes from it; or None.
        name: identifies model and adapter; the file of another one is refused.

    Raises:
        MTPError: two prompts or lanes of one name, or `out` belongs to another evaluation or is damaged.
    """

    def __init__(
        self,
        model: AttachedModel,
        tokenizer: TokenizerWrapper,
        prompts: Sequence[Prompt],
        lanes: Sequence[Lane],
        settings: EvaluationSettings,
        out: Path | None = None,
        name: str = "",
    ) -> None:
        self._model, self._tokenizer, self._settings = model, tokenizer, settings
        self._prompts, self._lanes = list(prompts), [PLAIN, *(lane for lane in lanes if lane != PLAIN)]
        for kind, names in (
            ("lane", [lane.name for lane in self._lanes]),
            ("task", [prompt.name for prompt in self._prompts]),
        ):
            ((name_twice, count),) = Counter(names).most_common(1)
            if count > 1:
                raise MTPError(f"the {kind} '{name_twice}' is there twice: give every {kind} once")
        self._kept = KeptRows(out, Answer, self._fingerprint(name), "an evaluation")
        self._done = {(row.lane, row.task): row for row in self._kept.read()}

    @property
    def total(self) -> int:
        """Answers of a whole evaluation."""
        return len(self._prompts) * len(self._lanes)

    def warm_up(self) -> None:
        """Generates a few tokens in every lane, not counted. Raises MTPError if a lane does not suit the model."""
        for lane in self._lanes:
            self._generate(encode_prompt(self._tokenizer, "Hello"), lane, 4)

    def run(self, on_answer: Callable[[Answer], None] | None = None) -> list[Answer]:
        """All answers, those of an earlier run included."""
        answers = []
        for prompt in self._prompts:
            ids = self._ids(prompt)
            plain: list[int] | None = None
            for lane in self._lanes:
                row = self._done.get((lane.name, prompt.name))
                if row is None:
                    if plain is None and lane != PLAIN:
                        plain = self._generate(ids, PLAIN, self._settings.max_tokens).tokens
                    row, tokens = self._answer(prompt, lane, ids, plain)
                    plain = tokens if lane == PLAIN else plain
                    self._kept.keep(row)
                answers.append(row)
                if on_answer is not None:
                    on_answer(row)
        return answers

    def _answer(
        self, prompt: Prompt, lane: Lane, ids: list[int], plain: list[int] | None
    ) -> tuple[Answer, list[int]]:
        found = self._generate(ids, lane, self._settings.max_tokens)
        agreeing, nll = own_path(self._model, ids, found.tokens)
        row = Answer(
            lane=lane.name,
            task=prompt.name,
            category=prompt.category,
            tokens=len(found.tokens),
            passes=found.stats.steps,
            timed_tokens=found.timed_tokens,
            seconds=found.seconds,
            submitted=list(found.stats.submitted),
            accepted=list(found.stats.accepted),
            agreeing=agreeing,
            nll=nll,
            same=plain is None or found.tokens == plain,
            right=prompt.is_right(found.text),
            lossless=lane.emission.lossless,
            text=found.text,
        )
        return row, found.tokens

    def _ids(self, prompt: Prompt) -> list[int]:
        if self._settings.raw:
            ids = encode_prompt(self._tokenizer, prompt.raw)
        else:
            ids = chat_prompt(self._tokenizer, prompt.text)
        warn_beyond(self._model.model, len(ids))
        return ids

    def _generate(self, ids: list[int], lane: Lane, max_tokens: int) -> _Generated:
        assert lane.layout is not None
        found = _Generated()
        responses = stream_generate(
            self._model,
            self._tokenizer,
            ids,
            max_tokens,
            layout=lane.layout,
            drafts=lane.drafts,
            lookup=lane.lookup,
            drafter=lane.drafter,
            emission=lane.emission,
            stats=found.stats,
        )
        with closing(responses):
            for response in responses:
                found.take(response.token, response.text)
        found.end()
        return found

    def _fingerprint(self, name: str) -> str:
        """Of everything that an answer depends on, except the lane: a later run may have more lanes."""
        prompts = [[p.name, p.category, p.text, p.raw, str(p.answer)] for p in self._prompts]
        content = json.dumps([name, self._settings.max_tokens, self._settings.raw, prompts])
        return hashlib.sha256(content.encode()).hexdigest()[:16]


class _Generated:
    """A text while it is generated; the clock starts after its first step."""

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.text = ""
        self.stats = DecodeStats()
        self.timed_tokens, self.seconds = 0, 0.0
        self._started, self._skipped = 0.0, 0

    def take(self, token: int, text: str) -> None:
        """One token."""
        if not self.tokens:
            self._started, self._skipped = time.perf_counter(), self.stats.tokens
        self.tokens.append(token)
        self.text += text

    def end(self) -> None:
        """After the last token."""
        self.seconds = time.perf_counter() - self._started
        self.timed_tokens = max(len(self.tokens) - self._skipped, 0)
