"""Draws the cases of a seed: case n of seed s is always the same one, however long the search runs."""

from __future__ import annotations

from dataclasses import replace
from difflib import get_close_matches
from typing import Any

import numpy as np

from mtp_mlx.decode.pick import SamplingConfig
from mtp_mlx.errors import MTPError
from mtp_mlx.token_ids import check_ids
from tests.tiny import VOCABULARY
from text_search import models
from text_search.case import SLOT_DRAFTERS, Case, Text, choices

LENGTHS = (12, 12, 12, 1, 2, 5, 18, 24)  # tokens to write
STOPS = ("e", "th", " the", "a", "(", "\n", "<", "ox")
HOT = (0.0, 0.0, 0.0, 0.5, 0.8, 1.3)
LAYOUTS_OF_STATES = (
    "plain",
    "linear",
    "auto",
)  # whose slots are behind the last row only, for recurrent state


def draw(seed: int, number: int) -> Case:
    """Case `number` of the search with this seed: any combination that the package allows."""
    rng = np.random.default_rng([seed, number])
    while True:
        case = _any_case(_Draw(rng))
        if allowed(case):
            return case


def allowed(case: Case) -> bool:
    """Whether the package, and MLX on this machine, offers this combination."""
    if not (_fits_model(case) and _fits_layout(case) and _fits_way(case)):
        return False
    return not models.why_not(case.architecture, case.drafter, case.exact)


def check(case: Case) -> None:
    """Raises MTPError for a case that cannot be run."""
    if case.architecture not in models.ARCHITECTURES:
        near = get_close_matches(case.architecture, models.ARCHITECTURES, n=1)
        hint = f"Did you mean {near[0]!r}?" if near else f"Known: {', '.join(models.ARCHITECTURES)}."
        raise MTPError(f"--case: unknown architecture {case.architecture!r}. {hint}")
    for ids in (case.biased, *(text.prompt for text in case.texts)):
        check_ids(list(ids), VOCABULARY, "--case: the prompt")
    if why := models.why_not(case.architecture, case.drafter, case.exact):
        raise MTPError(f"--case: {why}")
    if not allowed(case):
        raise MTPError(
            "--case: one of its options does not go together with the others, such as a layout without a drafter"
        )


def _fits_model(case: Case) -> bool:
    name, copied = case.architecture, case.drafter in models.COPIES_LAYERS
    if case.wide and name in models.NARROW_ONLY:
        return False
    if name in models.EXPERTS and case.dtype != "float32" and (copied or not case.bits):
        return False
    if case.window:
        return name in models.tiny.ARCHITECTURES and not case.kv_bits and case.way != "batch"
    return not case.kv_bits or models.can_quantise_cache(name)


def _fits_layout(case: Case) -> bool:
    drafts = case.drafter != "none" or case.lookup != "none"
    if case.has_slots and case.architecture in models.RECURRENT and case.layout not in LAYOUTS_OF_STATES:
        return False
    if case.tau and (not case.has_slots or case.layout not in ("linear", "quadratic") or case.way == "batch"):
        return False
    return (drafts or case.layout == "plain") and (case.has_slots or case.layout != "quadratic")


def _fits_way(case: Case) -> bool:
    if case.way == "turns":
        return case.architecture not in models.STATES_ONLY
    if case.way == "alone":
        return True
    if case.layout == "mixed" or case.exact or case.kv_bits or case.stop:
        return False
    return models.can_share(case.architecture, case.dtype, case.bits, case.wide)


class _Draw:
    """Random choices."""

    def __init__(self, rng: np.random.Generator) -> None:
        self.rng = rng

    def of(self, *values: Any) -> Any:
        """One of the values."""
        return values[int(self.rng.integers(len(values)))]

    def upto(self, least: int, most: int) -> int:
        """A whole number from `least` to `most`."""
        return int(self.rng.integers(least, most + 1))

    def tokens(self, most: int) -> tuple[int, ...]:
        """A prompt: random ids, or a few that repeat."""
        if self.of(True, False):
            return tuple(self.upto(0, VOCABULARY - 1) for _ in range(self.upto(1, most)))
        part = [self.upto(0, VOCABULARY - 1) for _ in range(self.upto(2, 5))]
        return tuple((part * most)[: self.upto(2, most)])


def _any_case(draw: _Draw) -> Case:
    way = draw.of("alone", "alone", "alone", "turns", "batch")
    return _of_a_batch(draw) if way == "batch" else _of_one_sequence(draw, way)


def _of_one_sequence(draw: _Draw, way: Any) -> Case:
    kv = draw.of("ordinary", "ordinary", "ordinary", "quantised", "rotating")
    return replace(
        _common(draw, draw.of(*models.ARCHITECTURES), "mixed"),
        tau=draw.of(0.0, 0.0, 0.0, 0.3),
        exact=draw.of(False, False, True),
        kv_bits=draw.of(4, 8) if kv == "quantised" else 0,
        quantized_kv_start=draw.of(0, 9, 17, 30) if kv == "quantised" else 0,
        window=draw.of(5, 9, 16) if kv == "rotating" else 0,
        stop=(draw.of(*STOPS),) if draw.of(True, False, False, False) else (),
        way=way,
        texts=_any_texts(draw, way),
    )


def _of_a_batch(draw: _Draw) -> Case:
    common = _common(draw, draw.of(*models.tiny.ARCHITECTURES), "auto")
    lookup = "text" if common.lookup == "knowing" else common.lookup  # what is known belongs to one text
    return replace(common, lookup=lookup, way="batch", texts=_any_texts(draw, "batch"))


def _common(draw: _Draw, architecture: str, layout: Any) -> Case:
    """What every way has; `layout` is one more layout to choose from."""
    drafter = draw.of(*choices("drafter"))
    layouts = ("linear", "auto", "tree", layout, *(["quadratic"] * 2 if drafter in SLOT_DRAFTERS else []))
    return Case(
        architecture=architecture,
        dtype=draw.of("float32", "float16", "bfloat16"),
        bits=draw.of(0, 0, 4, 8),
        drafter=drafter,
        acceptance=draw.of(None, 0.6, 0.9, 0.9, 1.0) if drafter != "none" else None,
        drafts=draw.upto(1, models.MOST_DRAFTS),
        layout=draw.of(*layouts, *layouts, "plain"),
        rows=draw.of(8, 4, 12, 2),
        lookup=draw.of("none", "text", "memory", "knowing"),
        prefill_step_size=draw.of(2048, 1, 3, 8),
        sampling=_any_sampling(draw),
        biased=tuple(sorted({draw.upto(0, VOCABULARY - 1) for _ in range(draw.of(0, 0, 0, 3))})),
    )


def _any_sampling(draw: _Draw) -> SamplingConfig:
    warp = draw.of({}, {}, {"top_k": 7}, {"top_p": 0.9}, {"min_p": 0.05}, {"top_k": 20, "top_p": 0.8})
    return SamplingConfig(
        temperature=draw.of(*HOT),
        seed=draw.upto(0, 2**40),
        repetition_penalty=draw.of(1.0, 1.0, 1.0, 1.3),
        repetition_context_size=draw.of(1, 5, 20),
        presence_penalty=draw.of(0.0, 0.0, 0.0, 0.5),
        frequency_penalty=draw.of(0.0, 0.0, 0.0, 0.3),
        **warp,
    )


def _any_texts(draw: _Draw, way: str) -> tuple[Text, ...]:
    if way == "alone":
        return (Text(draw.tokens(30), draw.of(*LENGTHS)),)
    made = []
    for _ in range(draw.upto(2, 3)):
        length = draw.of(*LENGTHS[:6])
        if way == "turns":
            made.append(Text(draw.tokens(12), length, taken=draw.of(0, 1, max(1, length - 2))))
        else:
            joins, alone_after = draw.upto(0, 3), draw.of(0, 0, 2)
            made.append(Text(draw.tokens(12), length, joins=joins, alone_after=alone_after))
    return tuple(made)
