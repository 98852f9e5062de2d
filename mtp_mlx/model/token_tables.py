"""Further tables that a trunk looks up by token id, beside its embedding; slots have no row in them.

Gemma 4 gives every layer an embedding of the token. Beyond the last row MLX reads whatever lies there.
"""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn


class TokensOnly(nn.Module):
    """An embedding that gives zeros for slot ids."""

    def __init__(self, base: nn.Module, vocab_size: int) -> None:
        super().__init__()
        self.base = base
        self._vocab_size = vocab_size

    def __call__(self, ids: mx.array) -> mx.array:
        """[B, R] int ids -> [B, R, D]."""
        real = (ids < self._vocab_size)[..., None]
        found = self.base(mx.minimum(ids, self._vocab_size - 1))
        return mx.where(real, found, mx.zeros_like(found))


def token_tables(trunk: nn.Module, embedding_name: str) -> dict[str, nn.Module]:
    """{name in the trunk: embedding} of all embeddings but the one with this name."""
    kinds = (nn.Embedding, nn.QuantizedEmbedding)
    return {
        name: module for name, module in trunk.items() if name != embedding_name and isinstance(module, kinds)
    }
