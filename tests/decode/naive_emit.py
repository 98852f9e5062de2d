"""Unverified emission the slow way: every pass is one causal sequence from the start, without a cache."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

Logits = Callable[
    [list[int], int], np.ndarray
]  # (tokens, masks behind them) -> [1 + masks, V] of the last rows


@dataclass
class Emitted:
    """What came of it.

    Attributes:
        blocks: the tokens of every pass.
        margin: least distance to another outcome: of the two likeliest logits, or of a probability from tau.
    """

    blocks: list[list[int]] = field(default_factory=list)
    margin: float = np.inf

    @property
    def tokens(self) -> list[int]:
        return [token for block in self.blocks for token in block]


def emit(
    logits: Logits, prompt: list[int], max_tokens: int, k: int, tau: float | None, own_pick: bool = False
) -> Emitted:
    """Reference of arXiv 2602.06019's generator: k tokens a pass from the last row and k - 1 masks.

    tau None is static emission; a tau of 1 emits one token a pass. With `own_pick` the first token of a pass need not
    reach tau; the paper's own rule is without.
    """
    out, text = Emitted(), list(prompt)
    while (left := max_tokens - len(out.tokens)) > 0:
        rows = logits(text, min(k, left) - 1).astype(np.float64)
        exponentials = np.exp(rows - rows.max(axis=1, keepdims=True))
        probabilities = exponentials.max(axis=1) / exponentials.sum(axis=1)
        count = len(rows)
        if tau is not None:
            count = int(own_pick)
            while tau < 1 and count < len(rows) and probabilities[count] >= tau:
                count += 1
            count = max(count, 1)
            out.margin = min(out.margin, *np.abs(probabilities[int(own_pick) :] - tau), np.inf)
        for row in rows[:count]:
            best = np.sort(row)
            out.margin = min(out.margin, best[-1] - best[-2])
        block = rows[:count].argmax(axis=1).tolist()
        out.blocks.append(block)
        text += block
    return out
