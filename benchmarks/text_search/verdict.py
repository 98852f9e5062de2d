"""Runs a case and says what came of it."""

from __future__ import annotations

import traceback
from dataclasses import dataclass

import mlx.core as mx

from mtp_mlx.decode.stats import DecodeStats
from mtp_mlx.measure.certificate import TIE_BOUNDS
from text_search import batches, running
from text_search.case import Case
from text_search.running import Written

SAME, NEAR_TIE, DIFFERENT, BITS, ERROR = "same", "near tie", "different text", "different bits", "error"


@dataclass(frozen=True)
class Verdict:
    """What came of a case.

    Attributes:
        kind: one of the names above.
        detail: where and how it differs, in words.
        accepted, rejected: drafts.
        tokens: that were compared.
    """

    kind: str
    detail: str = ""
    accepted: int = 0
    rejected: int = 0
    tokens: int = 0

    @property
    def is_finding(self) -> bool:
        """Whether the package broke its promise."""
        return self.kind not in (SAME, NEAR_TIE)

    def is_like(self, other: Verdict) -> bool:
        """Whether it is the same finding: of the same kind, and the same exception if it is one."""
        same_error = self.kind != ERROR or self.detail.split(":")[0] == other.detail.split(":")[0]
        return self.kind == other.kind and same_error


def judge(case: Case) -> Verdict:
    """Runs a case. An exception is a finding too; Ctrl-C is not caught."""
    try:
        truths = running.expected(case)
        run = batches.found if case.way == "batch" else running.found
        texts, stats = run(case, truths)
        kind, detail = _compared(case, truths, texts)
    except Exception as error:  # noqa: BLE001, whatever it is
        last = traceback.extract_tb(error.__traceback__)[-1]
        return Verdict(
            ERROR, f"{type(error).__name__}: {error} ({last.filename.split('/')[-1]}:{last.lineno})"
        )
    return _counted(kind, detail, stats, sum(len(text.tokens) for text in texts))


def _counted(kind: str, detail: str, stats: DecodeStats, tokens: int) -> Verdict:
    accepted = sum(stats.accepted)
    return Verdict(kind, detail, accepted, sum(stats.submitted) - accepted, tokens)


def _compared(case: Case, truths: list[Written], texts: list[Written]) -> tuple[str, str]:
    for number, (truth, text) in enumerate(zip(truths, texts)):
        if text.tokens != truth.tokens:
            return _parted(case, number, truth, text)
        whole = truth.reason and case.way != "batch"
        if whole and (text.text, text.reason) != (truth.text, truth.reason):
            return (
                DIFFERENT,
                f"text {number}: {text.text!r} ({text.reason}), not {truth.text!r} ({truth.reason})",
            )
        if case.exact and (off := _other_bits(case, number, truth, text)):
            return BITS, off
    return SAME, ""


def _parted(case: Case, number: int, truth: Written, text: Written) -> tuple[str, str]:
    """The kind and the place where two texts part."""
    pairs = list(zip(text.tokens, truth.tokens))
    at = next((index for index, pair in enumerate(pairs) if pair[0] != pair[1]), len(pairs))
    if at == len(pairs):
        return DIFFERENT, f"text {number} has {len(text.tokens)} tokens, not {len(truth.tokens)}"
    off = _apart(text.logits[at], truth.logits[at])
    bound = TIE_BOUNDS[getattr(mx, case.dtype)]
    detail = (
        f"text {number}, token {at}: {pairs[at][0]}, not {pairs[at][1]}; logits differ by up to {off:.2g}"
    )
    return NEAR_TIE if off < bound and not case.exact else DIFFERENT, detail


def _apart(own: mx.array, theirs: mx.array) -> float:
    """The largest difference of two rows of logits [V], whatever their mean."""
    own, theirs = own.astype(mx.float32), theirs.astype(mx.float32)
    return float(mx.abs(own - mx.logsumexp(own) - theirs + mx.logsumexp(theirs)).max().item())


def _other_bits(case: Case, number: int, truth: Written, text: Written) -> str:
    """Where exact logits are not those of plain decoding, or ""."""
    for at, (own, theirs) in enumerate(zip(text.logits, truth.logits)):
        if not mx.array_equal(own, theirs).item():
            return f"text {number}, token {at}: logits differ by up to {_apart(own, theirs):.2g}"
    return ""
