"""Whether two texts of one model are the same, and if not, whether rounding alone explains it.

A forward pass of several rows adds numbers in another order than a pass of one. Where the base model's two
best candidates are tied within that rounding, either is right, and the texts part. A *near-tie certificate*
says so: position, both tokens, and the gap between their logits in the base model's own one-row pass.
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
    """Outcome of comparing a text with the reference.

    Attributes:
        identical: every token equal.
        position: first generated token that differs, or None.
        gap: |logit difference| of the two candidates there, under the base model; None if identical.
        bound: gaps below this are near-ties.
    """

    identical: bool
    position: int | None = None
    reference_token: int | None = None
    token: int | None = None
    gap: float | None = None
    bound: float = 0.0

    @property
    def certified(self) -> bool:
        """Different, but only by a near-tie."""
        return not self.identical and self.gap is not None and self.gap < self.bound


def compare(
    model: nn.Module, prompt: Sequence[int], reference: Sequence[int], tokens: Sequence[int]
) -> Comparison:
    """Compares generated ids with mlx-lm's; on a difference, one pass of the bare model settles the gap.

    A text that merely ends early (same prefix, other length) is no near-tie: its gap stays None.
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
