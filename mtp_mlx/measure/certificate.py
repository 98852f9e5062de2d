"""Compares two texts of one model: are they the same, and if not, does rounding alone explain it?

A forward pass over several rows adds numbers in another order than a pass over one row. If the base model's two best
candidates are tied within that rounding, either is right, and the texts diverge. A *near-tie certificate* shows this:
the position, both tokens, and the gap between their logits in the base model's own one-row passes.

How far rounding moves logits depends on the precision of the weights, and on the model: in bfloat16 the scan of
Mamba-2 over several rows moves some by as much as 1, where a transformer's layers move them by 0.1. So the bound is
measured. The bare model, without any of this package's code, reads the same text in passes of several rows. The
standard deviation of what that changes, times `MARGIN`, is the bound, but at least `TIE_BOUNDS`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten
from mlx_lm.models.cache import make_prompt_cache

TIE_BOUNDS = {mx.float32: 1e-3, mx.float16: 0.05, mx.bfloat16: 0.25}  # logits, by precision, finest first
PASSES = (1, 2, 3, 4, 5, 6, 7, 8)  # rows of the passes that are compared with plain decoding's
VARIED = 32  # tokens of the prompt that are read in such passes too
MARGIN = 5.0  # standard deviations; the difference of two logits has 1.4


@dataclass(frozen=True)
class Comparison:
    """A text compared with the reference.

    Attributes:
        identical: every token is equal.
        position: index of the first generated token that differs, or None.
        reference_token, token: the two candidates there.
        gap: |difference of their logits| under the base model; None if the texts are identical or one ends early.
        bound: a smaller gap is a near-tie.
    """

    identical: bool
    position: int | None = None
    reference_token: int | None = None
    token: int | None = None
    gap: float | None = None
    bound: float = 0.0

    @property
    def certified(self) -> bool:
        """The texts differ, but only by a near-tie."""
        return not self.identical and self.gap is not None and self.gap < self.bound


@dataclass(frozen=True)
class Rounding:
    """What a bare model computes for one position, and how far rounding moves it.

    Attributes:
        logits: [V] float32, in passes of one row.
        moved: standard deviation of what passes of several rows change in them, the largest of several passes.
        bound: logits closer than this may swap places.
    """

    logits: mx.array
    moved: float
    bound: float


def compare(
    model: nn.Module, prompt: Sequence[int], reference: Sequence[int], tokens: Sequence[int]
) -> Comparison:
    """Compares generated ids with the reference; at a difference, the bare model measures the gap and the bound.

    A text that only ends earlier or later is not a near-tie: its gap is None.

    Args:
        model: the bare model, without wrappers.
        prompt: ids before both texts.
        reference, tokens: the generated ids, mlx-lm's and ours.
    """
    if list(reference) == list(tokens):
        return Comparison(identical=True)
    shared = 0
    for ours, theirs in zip(tokens, reference, strict=False):
        if ours != theirs:
            break
        shared += 1
    if shared in (len(tokens), len(reference)):
        return Comparison(identical=False, position=shared)
    measured = measure_rounding(model, prompt, reference[:shared])
    ours, theirs = int(tokens[shared]), int(reference[shared])
    gap = cast(float, mx.abs(measured.logits[ours] - measured.logits[theirs]).item())
    return Comparison(False, shared, theirs, ours, gap, measured.bound)


def measure_rounding(
    model: nn.Module,
    prompt: Sequence[int],
    tokens: Sequence[int],
    cache: list[Any] | None = None,
    after_pass: Callable[[list[Any]], None] | None = None,
) -> Rounding:
    """Reads a text as in plain decoding, and in passes of several rows, as in blocks of drafts.

    It takes about as long as to generate the text four times.

    Args:
        model: the bare model, without wrappers.
        prompt: ids before it, at least one; plain decoding reads all but the last in one pass.
        tokens: ids after it.
        cache: an empty prompt cache of another kind than the model's own.
        after_pass: called with the cache after every pass, such as to quantise it.
    """
    call: Any = model
    cache = make_prompt_cache(model) if cache is None else cache
    after_pass = after_pass or (lambda _: None)

    def read(ids: Sequence[int], rows: int, own: list[Any]) -> mx.array:
        """[V] logits after ids, which are read in passes of so many rows."""
        logits = mx.zeros((1,))
        for start in range(0, len(ids), rows):
            logits = call(mx.array([list(ids[start : start + rows])]), cache=own)[0, -1]
            after_pass(own)
            mx.eval(logits, [layer.state for layer in own])
        return logits.astype(mx.float32)

    text = [*prompt, *tokens]
    varied = max(0, len(prompt) - VARIED)  # where the rows of passes begin to vary
    read(text[:varied], max(1, varied), cache)
    plainly = copy.deepcopy(cache)
    read(text[varied : len(prompt) - 1], max(1, len(prompt)), plainly)
    alone = read(text[len(prompt) - 1 :], 1, plainly)
    moved = max(logits_apart(read(text[varied:], rows, copy.deepcopy(cache)), alone) for rows in PASSES)
    return Rounding(alone, moved, max(TIE_BOUNDS[coarsest(model)], MARGIN * moved))


def logits_apart(one: mx.array, other: mx.array) -> float:
    """Standard deviation of the difference of two rows of logits [V]."""
    return cast(float, mx.std(one.astype(mx.float32) - other.astype(mx.float32)).item())


def coarsest(model: nn.Module) -> mx.Dtype:
    """The coarsest precision among a model's weights or, if quantised, their scales.

    Not that of its logits: a model may compute them in float32 from states that are not.
    """
    weights: Any = tree_flatten(model.parameters())
    used = {value.dtype for _, value in weights}
    return next((dtype for dtype in reversed(TIE_BOUNDS) if dtype in used), mx.float32)
