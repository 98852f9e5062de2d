"""Tasks answered in several ways beside the model alone: speed, acceptance, agreement, perplexity, right answers.

The model alone is lane "plain": ordinary greedy decoding, always measured. A verified lane writes the same text
faster; a lossy one (`--emit`) may write another, and what that costs is measured against the plain lane's answers and
the model's own next-token path (`own_path`).
"""

from __future__ import annotations

import hashlib
import json
import time
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
from mtp_mlx.measure.tasks import Task
from mtp_mlx.measure.tau_sweep import own_path
from mtp_mlx.model.attach import AttachedModel

PLAIN = Lane("plain", "plain")


@dataclass(frozen=True)
class Answer:
    """One task in one lane.

    Attributes:
        lane, task, category: names.
        tokens, passes: written, and forward passes it took.
        timed_tokens, seconds: after the first step, so that the prompt counts for no lane.
        submitted, accepted: per depth, of drafts that verification reached; empty where nothing is verified.
        agreeing: tokens that the model's own path would have picked there.
        nll: summed negative log-likelihood of the tokens under that path, in nats.
        same: the text is the plain lane's.
        right: None where nobody knows; `reason` says why it is not.
        lossless: every token was verified.
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
    reason: str
    lossless: bool


@dataclass(frozen=True)
class EvaluationSettings:
    """`max_tokens` of an answer; `raw`: tasks as they are, without the chat template."""

    max_tokens: int
    raw: bool = False


class Evaluation:
    """Every task in every lane, the plain one first; with a file, goes on where an earlier run stopped.

    Args:
        model, tokenizer: from `mtp_mlx.load`.
        tasks: what is asked; names differ.
        lanes: beside the plain one; names differ.
        settings: see `EvaluationSettings`.
        out: JSONL file that keeps every answer's measurements, or None.
        name: what tells this model and adapter from others; a file of another one is refused.

    Raises:
        MTPError: two tasks or lanes of one name, or `out` belongs to another evaluation or is damaged.
    """

    def __init__(
        self,
        model: AttachedModel,
        tokenizer: TokenizerWrapper,
        tasks: Sequence[Task],
        lanes: Sequence[Lane],
        settings: EvaluationSettings,
        out: Path | None = None,
        name: str = "",
    ) -> None:
        self._model, self._tokenizer, self._settings = model, tokenizer, settings
        self._tasks, self._lanes = list(tasks), [PLAIN, *(lane for lane in lanes if lane != PLAIN)]
        for what, names in (("lane", [x.name for x in self._lanes]), ("task", [t.name for t in self._tasks])):
            if len(set(names)) < len(names):
                twice = next(each for each in names if names.count(each) > 1)
                raise MTPError(f"the {what} '{twice}' is there twice: give every {what} once")
        self._kept = KeptRows(out, Answer, self._fingerprint(name), "an evaluation")
        self._done = {(row.lane, row.task): row for row in self._kept.read()}

    @property
    def total(self) -> int:
        """Answers of a whole evaluation."""
        return len(self._tasks) * len(self._lanes)

    def warm_up(self) -> None:
        """A few tokens in every lane, not counted; refuses lanes that do not go with the model."""
        for lane in self._lanes:
            self._generate(encode_prompt(self._tokenizer, "Hello"), lane, 4)

    def run(self, on_answer: Callable[[Answer], None] | None = None) -> list[Answer]:
        """All answers; those of an earlier run are taken over."""
        answers = []
        for task in self._tasks:
            prompt = self._prompt(task)
            plain: list[int] | None = None
            for lane in self._lanes:
                row = self._done.get((lane.name, task.name))
                if row is None:
                    if plain is None and lane != PLAIN:
                        plain = self._generate(prompt, PLAIN, self._settings.max_tokens).tokens
                    row, tokens = self._answer(task, lane, prompt, plain)
                    plain = tokens if lane == PLAIN else plain
                    self._kept.keep(row)
                answers.append(row)
                if on_answer is not None:
                    on_answer(row)
        return answers

    def _answer(
        self, task: Task, lane: Lane, prompt: list[int], plain: list[int] | None
    ) -> tuple[Answer, list[int]]:
        found = self._generate(prompt, lane, self._settings.max_tokens)
        verdict = task.judge_raw(found.text) if self._settings.raw else task.judge(found.text)
        agreeing, nll = own_path(self._model, prompt, found.tokens)
        row = Answer(
            lane=lane.name,
            task=task.name,
            category=task.category,
            tokens=len(found.tokens),
            passes=found.stats.steps,
            timed_tokens=found.timed_tokens,
            seconds=found.seconds,
            submitted=list(found.stats.submitted),
            accepted=list(found.stats.accepted),
            agreeing=agreeing,
            nll=nll,
            same=plain is None or found.tokens == plain,
            right=verdict.right,
            reason=verdict.reason,
            lossless=lane.emission.lossless,
        )
        return row, found.tokens

    def _prompt(self, task: Task) -> list[int]:
        if self._settings.raw:
            return encode_prompt(self._tokenizer, task.raw)
        return chat_prompt(self._tokenizer, task.message)

    def _generate(self, prompt: list[int], lane: Lane, max_tokens: int) -> _Generated:
        assert lane.layout is not None
        found = _Generated()
        responses = stream_generate(
            self._model,
            self._tokenizer,
            prompt,
            max_tokens,
            layout=lane.layout,
            slots=lane.slots,
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
        """Of everything that an answer depends on but its lane and its task: more of both may follow."""
        tasks = {
            task.name: json.dumps([task.category, task.message, task.raw, task.reference])
            for task in self._tasks
        }
        content = json.dumps([name, self._settings.max_tokens, self._settings.raw, tasks], sort_keys=True)
        return hashlib.sha256(content.encode()).hexdigest()[:16]


class _Generated:
    """A text as it comes, with the clock started after its first step."""

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
