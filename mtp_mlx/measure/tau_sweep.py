"""Tokens per pass of ConfAdapt, and what they cost, for every tau (arXiv 2602.06019, results).

The cost is measured against the model's own next-token path, which for a gated adapter is the untouched base: the
share of tokens that this path would have picked in the same place, its negative log-likelihood of the text, the share
of texts that equal its own, and, for questions with an answer, the share answered right.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import mlx.core as mx
from mlx_lm.tokenizer_utils import TokenizerWrapper

from mtp_mlx.api import chat_prompt, encode_prompt, stream_generate
from mtp_mlx.decode.emission import Emission
from mtp_mlx.decode.stats import DecodeStats
from mtp_mlx.measure.kept import KeptRows
from mtp_mlx.measure.prompts import Prompt
from mtp_mlx.measure.rows import rounded
from mtp_mlx.model.attach import AttachedModel
from mtp_mlx.model.block import Block
from mtp_mlx.model.context import warn_beyond
from mtp_mlx.planning.tuned import weights_digest

LOGIT_ROWS = 256  # rows whose logits over the whole vocabulary are in memory at once
PLAIN = None  # stands for plain greedy decoding in a list of taus


@dataclass(frozen=True)
class Measured:
    """One question at one tau.

    Attributes:
        tau: of ConfAdapt, or None for plain decoding.
        question: its index.
        tokens, passes: tokens written, and the forward passes this took.
        agreeing: tokens that the model's own path would have picked there.
        nll: summed negative log-likelihood of the tokens under that path, in nats.
        same: the text is the plain one.
        right: None if the right answer is not known.
    """

    tau: float | None
    question: int
    tokens: int
    passes: int
    agreeing: int
    nll: float
    same: bool
    right: bool | None


@dataclass(frozen=True)
class SweepSettings:
    """What a sweep measures. `drafts`: per pass, None for all. `raw`: without the chat template."""

    taus: tuple[float, ...]
    max_tokens: int
    drafts: int | None = None
    raw: bool = False


class TauSweep:
    """Every question at every tau.

    Args:
        model, tokenizer: from `mtp_mlx.load`; the model's drafts can be emitted unverified.
        questions: to answer.
        settings: see `SweepSettings`.
        out: JSONL file that keeps every measurement, so that the next run resumes from it; or None.
        name: identifies the model; a file of another one, or of another adapter, is refused.

    Raises:
        MTPError: a tau out of range, or `out` belongs to another sweep or is damaged.
    """

    def __init__(
        self,
        model: AttachedModel,
        tokenizer: TokenizerWrapper,
        questions: Sequence[Prompt],
        settings: SweepSettings,
        out: Path | None = None,
        name: str = "",
    ) -> None:
        self._model, self._tokenizer, self._questions = model, tokenizer, list(questions)
        self._settings = settings
        for tau in settings.taus:
            Emission("conf-adapt", tau)
        self._kept = KeptRows(out, Measured, self._fingerprint(name), "a tau sweep")
        self._done = {(row.tau, row.question): row for row in self._kept.read()}
        self._plain: dict[int, list[int]] = {}

    @property
    def total(self) -> int:
        """Number of measurements in a whole sweep."""
        return len(self._questions) * (1 + len(self._settings.taus))

    def run(self, on_measured: Callable[[Measured], None] | None = None) -> list[Measured]:
        """All measurements, those of an earlier run included."""
        results = []
        for index in range(len(self._questions)):
            for tau in (PLAIN, *self._settings.taus):
                row = self._done.get((tau, index))
                if row is None:
                    row = self._measure(tau, index)
                    self._kept.keep(row)
                results.append(row)
                if on_measured is not None:
                    on_measured(row)
        return results

    def _measure(self, tau: float | None, index: int) -> Measured:
        question = self._questions[index]
        prompt = self._ids(question)
        tokens, text, stats = self._generate(prompt, tau)
        if tau is None:
            self._plain[index] = tokens
        elif index not in self._plain:
            self._plain[index] = self._generate(prompt, None)[0]
        agreeing, nll = own_path(self._model, prompt, tokens)
        right = question.is_right(text)
        same = tokens == self._plain[index]
        return Measured(tau, index, len(tokens), stats.steps, agreeing, nll, same, right)

    def _ids(self, question: Prompt) -> list[int]:
        if self._settings.raw:
            ids = encode_prompt(self._tokenizer, question.raw)
        else:
            ids = chat_prompt(self._tokenizer, question.text)
        warn_beyond(self._model.model, len(ids))
        return ids

    def _generate(self, prompt: list[int], tau: float | None) -> tuple[list[int], str, DecodeStats]:
        """Greedy ids, their text, and counts."""
        settings, stats = self._settings, DecodeStats()
        plain = tau is None
        responses = stream_generate(
            self._model,
            self._tokenizer,
            prompt,
            settings.max_tokens,
            layout="plain" if plain else "linear",
            drafts=None if plain else settings.drafts,
            emission=Emission() if plain else Emission("conf-adapt", tau),
            stats=stats,
        )
        tokens, text = [], ""
        with closing(responses):
            for response in responses:
                tokens.append(response.token)
                text += response.text
        return tokens, text, stats

    def _fingerprint(self, name: str) -> str:
        """Of everything that a measurement depends on, except the taus: a later run may have more of them."""
        settings = {key: value for key, value in asdict(self._settings).items() if key != "taus"}
        name += weights_digest(self._model)
        questions = [(question.text, str(question.answer)) for question in self._questions]
        content = json.dumps([name, settings, questions], sort_keys=True)
        return hashlib.sha256(content.encode()).hexdigest()[:16]


def own_path(model: AttachedModel, prompt: list[int], tokens: list[int]) -> tuple[int, float]:
    """(tokens the model's own path would have picked, their negative log-likelihood in nats) in one pass.

    Each token is judged after the prompt and the tokens before it, as they are.
    """
    if not tokens:
        return 0, 0.0
    ids = mx.array([[*prompt, *tokens[:-1]]])
    hidden = model.forward(Block.real(ids), model.make_cache())[0, len(prompt) - 1 :]  # [T, D]
    agreeing, nll = 0, 0.0
    for start in range(0, len(tokens), LOGIT_ROWS):
        said = mx.array(tokens[start : start + LOGIT_ROWS])
        logits = model.head(hidden[None, start : start + LOGIT_ROWS])[0].astype(mx.float32)  # [<= rows, V]
        picked = mx.take_along_axis(logits, said[:, None], axis=-1)[:, 0]
        agreeing += int(cast(int, mx.sum(mx.argmax(logits, axis=-1) == said).item()))
        nll += float(cast(float, mx.sum(mx.logsumexp(logits, axis=-1) - picked).item()))
    return agreeing, nll


TAU_COLUMNS = ("tau", "questions", "tok/pass", "agreement", "nll/token", "same text", "right")


@dataclass(frozen=True)
class TauRow:
    """All questions at one tau.

    Attributes:
        tau: None for plain decoding.
        tokens_per_pass: all tokens over all passes.
        agreement: share of tokens that the model's own path would have picked.
        nll: mean negative log-likelihood of a token under that path, in nats.
        same: share of texts that equal the plain ones.
        right: share of right answers among questions with a known one; None without any.
        lossless: True for plain decoding only.
    """

    tau: float | None
    questions: int
    tokens_per_pass: float
    agreement: float
    nll: float
    same: float
    right: float | None
    lossless: bool

    def to_json(self) -> dict[str, Any]:
        """Plain values, rounded."""
        return rounded(self)

    def cells(self) -> tuple[str, ...]:
        """The row of a table with `TAU_COLUMNS`."""
        return (
            "plain" if self.tau is None else f"{self.tau:g}",
            str(self.questions),
            f"{self.tokens_per_pass:.2f}",
            f"{100 * self.agreement:.1f} %",
            f"{self.nll:.3f}",
            f"{100 * self.same:.0f} %",
            "-" if self.right is None else f"{100 * self.right:.1f} %",
        )


def summarise(measured: Sequence[Measured]) -> list[TauRow]:
    """One row per tau, the plain one first, then by falling tau."""
    taus = sorted({row.tau for row in measured}, key=lambda tau: -2.0 if tau is None else -tau)
    return [_row(tau, [row for row in measured if row.tau == tau]) for tau in taus]


def _row(tau: float | None, own: Sequence[Measured]) -> TauRow:
    tokens = max(sum(row.tokens for row in own), 1)
    answered = [row.right for row in own if row.right is not None]
    return TauRow(
        tau=tau,
        questions=len(own),
        tokens_per_pass=tokens / max(sum(row.passes for row in own), 1),
        agreement=sum(row.agreeing for row in own) / tokens,
        nll=sum(row.nll for row in own) / tokens,
        same=sum(row.same for row in own) / len(own),
        right=sum(answered) / len(answered) if answered else None,
        lossless=tau is None,
    )
