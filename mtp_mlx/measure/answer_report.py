"""Answers summarised by lane and category: JSON values and tables."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Group

from mtp_mlx.decode.stats import DecodeStats
from mtp_mlx.measure.evaluation import PLAIN, Answer
from mtp_mlx.measure.rows import RATIO, lane_table, rounded
from mtp_mlx.measure.speed import compare_speeds, ratio_text


@dataclass(frozen=True)
class EvaluationRow:
    """One category (or all) in one lane.

    Attributes:
        tokens_per_second, plain_tokens_per_second: this lane's and the plain lane's, all tokens over all seconds.
        speedup: the ratio of these two; None if nothing was timed.
        mean_of_ratios: the mean of the tasks' own ratios, to be read beside `speedup`.
        tokens_per_step: tokens per forward pass, over all tasks.
        acceptance: per depth, P(accepted | reached); empty if nothing is verified.
        agreement: share of tokens that the model's own path would have picked.
        perplexity: of the texts under the model's own path.
        same: share of texts that equal the plain lane's.
        right: share of right answers among those whose reference is known; None without any.
        judged: how many answers have a known reference.
        lossless: False if any text was written unverified.
    """

    lane: str
    category: str
    tasks: int
    tokens_per_second: float
    plain_tokens_per_second: float
    speedup: float | None
    mean_of_ratios: float | None
    tokens_per_step: float
    acceptance: list[float | None]
    agreement: float
    perplexity: float
    same: float
    right: float | None
    judged: int
    lossless: bool

    def to_json(self) -> dict[str, Any]:
        """Plain values, rounded."""
        return rounded(self)


def summarise(answers: Sequence[Answer]) -> list[EvaluationRow]:
    """One row per lane and category, then one per lane over all. Only tasks answered in every lane count."""
    lanes = list(dict.fromkeys(answer.lane for answer in answers))
    counts = Counter(answer.task for answer in answers)
    whole = [answer for answer in answers if counts[answer.task] == len(lanes)]
    categories = list(dict.fromkeys(answer.category for answer in whole))
    groups = [*categories, None] if len(categories) > 1 else categories
    return [_row(lane, group, whole) for lane in lanes for group in groups]


def _row(lane: str, category: str | None, answers: Sequence[Answer]) -> EvaluationRow:
    group = [answer for answer in answers if category in (None, answer.category)]
    own = [answer for answer in group if answer.lane == lane]
    tokens = max(sum(answer.tokens for answer in own), 1)
    plain = {answer.task: answer for answer in group if answer.lane == PLAIN.name}
    speeds = compare_speeds((answer, plain[answer.task]) for answer in own)
    stats = DecodeStats()
    for answer in own:
        stats.add(DecodeStats(submitted=list(answer.submitted), accepted=list(answer.accepted)))
    judged = [answer for answer in own if answer.right is not None]
    return EvaluationRow(
        lane=lane,
        category="all" if category is None else category,
        tasks=len(own),
        tokens_per_second=speeds.tokens_per_second,
        plain_tokens_per_second=speeds.plain_tokens_per_second,
        speedup=speeds.speedup,
        mean_of_ratios=speeds.mean_of_ratios,
        tokens_per_step=tokens / max(sum(answer.passes for answer in own), 1),
        acceptance=stats.acceptance,
        agreement=sum(answer.agreeing for answer in own) / tokens,
        perplexity=math.exp(min(sum(answer.nll for answer in own) / tokens, 700.0)),
        same=sum(answer.same for answer in own) / max(len(own), 1),
        right=sum(answer.right is True for answer in judged) / len(judged) if judged else None,
        judged=len(judged),
        lossless=all(answer.lossless for answer in own),
    )


def tables(rows: Sequence[EvaluationRow]) -> Group:
    """Two tables that fit a terminal: speed, and text."""
    speed = lane_table(
        "speed against the model alone (lane plain), greedy",
        ("lane", "category"),
        ("tasks", "tok/s", RATIO, "tok/step", "accept"),
    )
    text = lane_table("text against the model alone", ("lane", "category"), ("agree", "ppl", "same", "right"))
    for row in rows:
        names = (row.lane + ("" if row.lossless else " (lossy)"), row.category)
        speed.add_row(
            *names,
            str(row.tasks),
            f"{row.tokens_per_second:.1f}",
            ratio_text(row.speedup, row.mean_of_ratios),
            f"{row.tokens_per_step:.2f}",
            "/".join("-" if value is None else f"{value:.2f}" for value in row.acceptance) or "-",
        )
        text.add_row(
            *names,
            f"{100 * row.agreement:.1f}%",
            f"{row.perplexity:.2f}",
            f"{100 * row.same:.0f}%",
            "-" if row.right is None else f"{100 * row.right:.1f}%",
        )
    return Group(speed, text)
