"""Acceptance per depth on held-out text, measured without decoding.

A draft counts as accepted if it equals the token of the text and all drafts before it in its block did. On greedy
answers of the base model itself the text is what decoding would verify against, so this is the acceptance of
decoding. On other text (sampled, or written by somebody else) it is an estimate.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Agreement:
    """Measured acceptance.

    Attributes:
        acceptance: per depth, P(draft is accepted | the drafts before it were).
        blocks: number of blocks of drafts it was measured on.
    """

    acceptance: list[float]
    blocks: int

    @property
    def tokens_per_step(self) -> float:
        """Expected tokens per step if every step verified a whole block of drafts."""
        return float(1 + np.sum(np.cumprod(self.acceptance)))


class Tally:
    """Counts accepted drafts over batches.

    Args:
        depths: drafts per block.
    """

    def __init__(self, depths: int) -> None:
        self._reached, self._accepted = np.zeros(depths), np.zeros(depths)
        self._blocks = 0

    def add(self, right: np.ndarray) -> None:
        """Counts blocks; `right` [blocks, depths] bool: the draft equals the token of the text."""
        accepted = np.cumprod(right, axis=1)  # until the first wrong draft
        self._accepted += accepted.sum(axis=0)
        self._reached += np.concatenate([np.ones((len(right), 1)), accepted[:, :-1]], axis=1).sum(axis=0)
        self._blocks += len(right)

    def agreement(self) -> Agreement:
        """The result so far; acceptance is 0 at depths that no block reached."""
        pairs = zip(self._accepted, self._reached, strict=True)
        return Agreement(
            [float(accepted / reached) if reached else 0.0 for accepted, reached in pairs], self._blocks
        )
