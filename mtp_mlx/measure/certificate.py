"""Compares two texts of one model: are they the same, and if not, does rounding alone explain it?

A forward pass over several rows adds numbers in another order than a pass over one row. If the base model's two best
candidates are tied within that rounding, either is right, and the texts diverge. A *near-tie certificate* shows this:
the position, both tokens, and the gap between their logits in the base model's own one-row pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.cache import make_prompt_cache

TIE_BOUNDS = {mx.float32: 1e-3, mx.bfloat16: 0.25, mx.float16: 0.05}  # logits, by compute dtype


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


def compare(
    model: nn.Module, prompt: Sequence[int], reference: Sequence[int], tokens: Sequence[int]
) -> Comparison:
    """Compares generated ids with the reference; at a difference, one pass of the bare model measures the gap.

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
    cache = make_prompt_cache(model)
    logits = model(mx.array([[*prompt, *reference[:shared]]]), cache=cache)[0, -1]
    bound = TIE_BOUNDS.get(logits.dtype, TIE_BOUNDS[mx.float32])
    ours, theirs = int(tokens[shared]), int(reference[shared])
    gap = abs(float((logits[ours] - logits[theirs]).astype(mx.float32).item()))
    return Comparison(False, shared, theirs, ours, gap, bound)
