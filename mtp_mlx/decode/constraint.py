"""What every token of a text must satisfy, such as a grammar: the seam between the decode loop and a grammar library.

A constraint masks the target's logits before anything else is done with them, row by row along the drafts. So a
draft that it refuses is simply not accepted, drafting stays on, and the text equals plain constrained decoding.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np


class Constraint(Protocol):
    """The state of one text."""

    def allowed(self, drafts: list[int]) -> np.ndarray:
        """[1 + d, V] bool: tokens that may follow the text and the first i drafts, in row i.

        Rows behind a draft that is refused, or that ends the text, are never read; every row allows one token at
        least.
        """
        ...

    def commit(self, tokens: list[int]) -> None:
        """Appends tokens to the text. Those behind an end-of-text token mean nothing."""
        ...
