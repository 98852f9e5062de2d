"""Acceptance per depth on held-out text, without decoding.

On greedy answers of the base model itself the label is the base's own pick, so a chain of drafts that
equal the labels is exactly a run of accepted drafts, and teacher-forced rows give decoding's acceptance.
On other text (sampled, or somebody else's) it is an estimate.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Agreement:
    """acceptance[j - 1] = P(draft j right | drafts before it right), over `blocks` blocks."""

    acceptance: list[float]
    blocks: int

    @property
    def tokens_per_step(self) -> float:
        """Expected tokens per step if every step had k fresh drafts (quadratic layout)."""
        return float(1 + np.sum(np.cumprod(self.acceptance)))
