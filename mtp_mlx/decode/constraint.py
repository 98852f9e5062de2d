"""What a caller may do to the target's logits: a constraint, such as a grammar, and mlx-lm's logits processors.

A constraint masks the target's logits before penalties, warps and sampling, one row per draft. A draft that it
forbids is simply not accepted, so drafting stays on and the text equals that of plain constrained decoding.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import mlx.core as mx
import numpy as np

from mtp_mlx.errors import MTPError

# As in mlx-lm: the tokens before the pick [T] int32, prompt included, and the logits [1, V] -> logits [1, V]. It must
# be a function of these alone, because a pass calls it for drafts that may be rejected.
LogitsProcessor = Callable[[mx.array, mx.array], mx.array]


class Constraint(Protocol):
    """A constraint, such as a grammar, and its state in one text."""

    def allowed(self, drafts: list[int]) -> np.ndarray:
        """[1 + d, V] bool: row i marks the tokens that may follow the text and the first i drafts.

        Rows after a draft that is forbidden or ends the text are never read. Every row must allow at least one token.
        """
        ...

    def commit(self, tokens: list[int]) -> None:
        """Appends tokens to the text. Anything after an end-of-text token should be ignored."""
        ...


def processed(processors: Sequence[LogitsProcessor], logits: mx.array, texts: Sequence[mx.array]) -> mx.array:
    """[R, V] logits after every processor, in their order; each row has its own text.

    Args:
        processors: if there are none, `logits` are returned.
        logits: [R, V].
        texts: [R] int32 arrays, the tokens before each row's pick.

    Raises:
        MTPError: if a processor returns another shape.
    """
    if not processors:
        return logits
    rows = []
    for row, text in enumerate(texts):
        one = logits[row : row + 1]
        for number, processor in enumerate(processors):
            found = processor(text, one)
            if getattr(found, "shape", None) != one.shape:
                raise MTPError(
                    f"`logits_processors[{number}]` must return logits of shape {one.shape}, as it was given; it "
                    f"returned {getattr(found, 'shape', type(found).__name__)}"
                )
            one = found
        rows.append(one)
    return mx.concatenate(rows)
