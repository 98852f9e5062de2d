"""Meta's parallel heads (arXiv 2404.19737): a decoder layer each, all on the state before the trunk's last layer.

The trunk's last layer is the next-token head. Extra head i (from 1) runs its layer over the same states, with
attention over earlier rows and a KV cache of its own; the trunk's last norm and LM head follow, and row r predicts
token r + 1 + i. No embedding goes in, so rows are final as soon as the trunk's are.
Legend: B batch, T rows, D hidden size.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.base import create_attention_mask

from mtp_mlx.model.draft_heads import IndependentHeads


class ParallelHead(nn.Module):
    """One head; `block` is a decoder layer, called as mlx-lm calls its own."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def __call__(self, hidden: mx.array, cache: Any = None) -> mx.array:
        """[B, T, D] -> [B, T, D], before the trunk's last norm; the cache grows by T."""
        return self.block(hidden, create_attention_mask(hidden, cache, return_array=True), cache)


class ParallelHeads(IndependentHeads):
    """All heads of a model."""

    heads: list[ParallelHead]
