"""The sampler head: makes a slot's draft depend on the draft before it (arXiv 2507.11851, section 2.3).

p = W_unembed . MLP([E[y_prev]; z]) with two blocks of Linear -> SiLU -> LayerNorm. Two departures, both
recorded in the adapter's config: a residual path around the MLP whose last gain starts at zero (an
untrained head is then the slot's own prediction, and the scale the unembedding expects need not be
learnt), and E[y_prev] divided by its root mean square (embedding tables are scaled very differently
from one model family to the next).
"""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn


class SamplerHead(nn.Module):
    """Args: hidden size D; residual False gives the paper's own form."""

    def __init__(self, hidden_size: int, residual: bool = True) -> None:
        super().__init__()
        self.first = nn.Linear(2 * hidden_size, hidden_size)
        self.first_norm = nn.LayerNorm(hidden_size)
        self.second = nn.Linear(hidden_size, hidden_size)
        self.second_norm = nn.LayerNorm(hidden_size)
        self._residual = residual
        if residual:
            self.second_norm.weight = mx.zeros((hidden_size,))

    def __call__(self, previous_embedding: mx.array, hidden: mx.array) -> mx.array:
        """Hidden state to unembed.

        Args:
            previous_embedding: [..., D] E[y_prev], the token just before the one predicted.
            hidden: [..., D] latent z of the slot, after the final norm.

        Returns:
            [..., D] in float32.
        """
        hidden = hidden.astype(mx.float32)
        previous = previous_embedding.astype(mx.float32)
        previous = previous * mx.rsqrt(mx.mean(mx.square(previous), axis=-1, keepdims=True) + 1e-6)
        x = mx.concatenate([previous, hidden], axis=-1)
        x = self.first_norm(nn.silu(self.first(x)))
        x = self.second_norm(nn.silu(self.second(x)))
        return x + hidden if self._residual else x
