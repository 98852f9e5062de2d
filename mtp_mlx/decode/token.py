"""What the decode loops yield."""

from __future__ import annotations

from typing import NamedTuple

import mlx.core as mx


class Token(NamedTuple):
    """One committed token.

    Attributes:
        token: its id.
        logits: [V] the target's raw logits at this position, computed by the pass anyway; lazy. Of a draft that
            was emitted without verification: the raw logits of its slot.
        from_draft: it was drafted, and accepted (the text is the same either way) or emitted unverified.
        depth: which draft of its step it was, from 1; 0 for the target's own pick.
    """

    token: int
    logits: mx.array
    from_draft: bool
    depth: int
