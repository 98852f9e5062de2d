"""Runs a case and says what came of it."""

from __future__ import annotations

import traceback
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
from mlx_lm.generate import maybe_quantize_kv_cache

from mtp_mlx.decode.pick import Picker
from mtp_mlx.decode.stats import DecodeStats
from mtp_mlx.measure.certificate import logits_apart, measure_rounding
from text_search import batches, models, running
from text_search.case import Case
from text_search.running import Written

SAME, NEAR_TIE, DIFFERENT, BITS = "same", "near tie", "different text", "different bits"
ERROR, CRASH = "error", "crash"

MARGIN = 3.0  # how much further than mlx-lm's own passes of several rows ours may move logits
LEAST_MOVED = {"float32": 2e-4, "float16": 0.01, "bfloat16": 0.05}  # in case these passes happen to agree


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
    off = logits_apart(text.logits[at], truth.logits[at])
    detail = f"text {number}, token {at}: {pairs[at][0]}, not {pairs[at][1]}; logits differ by {off:.2g}"
    if case.exact:
        return DIFFERENT, detail
    if not _picked_right(case, number, truth, text, at):
        return DIFFERENT, f"{detail}, and one of the tokens is not what its own logits say"
    bound = MARGIN * _moved(case, *_text_before(case, number, truth, at))
    return NEAR_TIE if off < bound else DIFFERENT, f"{detail}, where rounding explains {bound:.2g}"


def _text_before(case: Case, number: int, truth: Written, at: int) -> tuple[list[int], list[int]]:
    """(what was read before the text, the text before token `at`)."""
    prompt: list[int] = []
    if case.way == "turns":
        for turn, written in zip(case.texts[:number], truth.before):
            prompt += [*turn.prompt, *written]
    return [*prompt, *case.texts[number].prompt], truth.tokens[:at]


def _moved(case: Case, prompt: list[int], tokens: list[int]) -> float:
    """How far the rows of a pass move the logits of mlx-lm's own model there; a standard deviation."""

    def quantise(cache: list[Any]) -> None:
        bits = case.kv_bits or None
        maybe_quantize_kv_cache(cache, case.quantized_kv_start, models.GROUP, bits)

    cache = models.new_cache(case, models.attached(case, "none"))
    moved = measure_rounding(models.bare_of(case), prompt, tokens, cache, quantise).moved
    return max(moved, LEAST_MOVED[case.dtype])


def _picked_right(case: Case, number: int, truth: Written, text: Written, at: int) -> bool:
    """Whether each of the two tokens is what its own logits say, by a picker that knows nothing of blocks."""
    prompt, tokens = _text_before(case, number, truth, at)
    sampling = case.picked_by
    size = Picker(sampling).history_size
    own = [*case.texts[number].prompt, *tokens]  # penalties do not count earlier turns
    history = mx.array([([-1] * size + own)[len(own) :]], dtype=mx.int32)
    position = mx.array([len(prompt) + len(tokens)])
    return all(
        Picker(sampling, exact=exact).pick(one.logits[at][None], position, history).item() == one.tokens[at]
        for one, exact in ((text, False), (truth, True))
    )


def _other_bits(case: Case, number: int, truth: Written, text: Written) -> str:
    """Where exact logits are not those of plain decoding, or ""."""
    for at, (own, theirs) in enumerate(zip(text.logits, truth.logits)):
        if not mx.array_equal(own, theirs).item():
            return f"text {number}, token {at}: logits differ by {logits_apart(own, theirs):.2g}"
    return ""
