"""What a pass says about a block, made by hand for drafters that look behind it."""

from __future__ import annotations

import mlx.core as mx

from mtp_mlx.decode.drafter import Verified
from mtp_mlx.decode.layout import Layout
from mtp_mlx.model.block import block_shape


def verified_block(
    states: mx.array, picks: mx.array, accepted: int, position: int, tokens: list[int], count: int
) -> Verified:
    """A block of states [1, 1 + d, D], `accepted` of whose drafts are accepted, that asks for `count` fresh ones."""
    drafts = states.shape[1] - 1
    layout = Layout.chained(drafts, count)
    return Verified(
        layout=layout,
        shape=block_shape(drafts, layout.slots),
        hidden=states[0],
        head_input=states,
        logits=mx.zeros((1 + drafts, 1)),
        picks=picks,
        accepted=mx.array(accepted),
        last=mx.array(accepted),
        position=mx.array(position),
        history=None,
        tokens=tokens,
    )
