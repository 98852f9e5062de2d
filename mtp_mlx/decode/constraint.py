"""Constrained decoding: the interface between the decode loop and a grammar library.

A constraint masks the target's logits before penalties, warps and sampling, one row per draft. A draft that it
forbids is simply not accepted, so drafting stays on and the text equals that of plain constrained decoding.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np


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
