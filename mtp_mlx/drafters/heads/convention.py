"""How families of MTP heads differ, as data: written by the converter, read at run time. Needs no mlx."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

MOST_HEADS = 1000  # sanity limit on heads, and on drafts per step, in a config


@dataclass(frozen=True)
class HeadConvention:
    """How the heads of a family are run.

    Attributes:
        family: short name of the family.
        kind: "cascade" (fuse, block, norm: DeepSeek's form), "medusa" (residual layers and an LM head on the last
            hidden state) or "parallel" (Meta: a block each, all on the same hidden state).
        stored_order: which input the first columns of the fuse weight act on in the checkpoint, "embedding" or
            "hidden". Our weight is embedding-first; its columns were swapped if this is "hidden".
        first_hidden: the trunk's hidden state that the first head takes: "post-norm" or "pre-norm" (after or before
            the trunk's final norm) or "before-last-layer".
        recycled_hidden: the state passed to the next head: "normed" (after norm_out), "raw" (the block's output),
            "trunk" (the head's own input, so every head gets the trunk's state), or "none" (heads are independent).
        zero_centred_norms: whether the checkpoint stores norm weights around zero; ours have 1 added.
        mixed_norms: whether it stores only those of the decoder layers so, as half-converted ones do.
        mask_first_position: whether the embedding of position 0 is replaced by zeros.
        output_norm: "own", "identity" or "trunk" (a cascade's head has a copy of the trunk's final norm).
        embedding, lm_head: "shared" with the trunk, or the head's "own".
        rope_position: "hidden": a row has the position of its hidden state (its embedding is the next token's).
        unsettled: fields above on which published implementations disagree; worth measuring.
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
    mixed_norms: bool = False

    def to_json(self) -> dict[str, Any]:
        """The values written to mtp_config.json."""
        values = dataclasses.asdict(self) | {"unsettled": list(self.unsettled)}
        if not self.mixed_norms:
            del values["mixed_norms"]
        return values
