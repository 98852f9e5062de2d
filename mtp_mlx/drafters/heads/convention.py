"""What differs between families of MTP heads, as data: written by the converter, read when run. Needs no mlx."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

MOST_HEADS = 1000  # and tokens drafted in a step: far more than any, and few enough to make


@dataclass(frozen=True)
class HeadConvention:
    """Everything in which families of heads differ, as data.

    Attributes:
        family: short name of the family.
        kind: "cascade" (fuse, block, norm: DeepSeek's form), "medusa" (residual layers and an LM head on the last
            hidden state) or "parallel" (Meta: a block each, all on the same hidden state).
        stored_order: which input the first columns of the stored fuse weight act on: "embedding" or "hidden".
            The canonical weight is embedding-first; columns were swapped where this says "hidden".
        first_hidden: the trunk's state that goes in first: "post-norm", "pre-norm" (after or before the trunk's
            last norm) or "before-last-layer".
        recycled_hidden: what the next draft step takes: "normed" (after norm_out), "raw" (the block's output),
            "trunk" (the state that the head took itself, so every head has the trunk's), or "none" (no draft step
            rests on another).
        zero_centred_norms: the norms were stored around zero; the canonical ones have 1 added.
        mask_first_position: the embedding of position 0 is replaced by zeros.
        output_norm: "own", "identity" or "trunk" (a cascade's head carries a copy of the trunk's last norm).
        embedding, lm_head: "shared" with the trunk, or the head's "own".
        rope_position: a row's position is that of its "hidden" state (the embedding is the next token's).
        unsettled: fields above on which published runtimes disagree; worth measuring.
    """

    family: str
    kind: str = "cascade"
    stored_order: str = "embedding"
    first_hidden: str = "post-norm"
    recycled_hidden: str = "normed"
    zero_centred_norms: bool = False
    mask_first_position: bool = False
    output_norm: str = "own"
    embedding: str = "shared"
    lm_head: str = "shared"
    rope_position: str = "hidden"
    unsettled: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """For mtp_config.json."""
        return dataclasses.asdict(self) | {"unsettled": list(self.unsettled)}
