"""The one acceptance rule: a draft is accepted while it equals the target's pick (design 2.3).

No residual sampling: the pick is a function of logits and of noise fixed per position, so equality alone
makes the text that of plain decoding, at any temperature.
"""

from __future__ import annotations

import mlx.core as mx


def leading_run(picks: mx.array, drafts: mx.array) -> mx.array:
    """Number of accepted drafts: the length of the leading run of equal tokens (never a count of matches).

    Args:
        picks: [d + 1] int32 target picks; picks[i] is for the position of drafts[i].
        drafts: [d] int32.

    Returns:
        int32 scalar, lazily.
    """
    if drafts.size == 0:
        return mx.array(0, dtype=mx.int32)
    equal = (picks[:-1] == drafts).astype(mx.int32)
    return mx.sum(mx.cumprod(equal)).astype(mx.int32)
