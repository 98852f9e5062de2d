"""The sampler head: makes a slot's draft depend on the draft before it (arXiv 2507.11851, section 2.3).

The paper: p = W_unembed . MLP([E[y_prev]; z]), two blocks of Linear -> SiLU -> LayerNorm. Here the second
block is a plain linear layer that starts at zero and is added to z: an untrained head is the slot's own
prediction, and the scale that the unembedding expects need not be learnt through a LayerNorm gain (which,
started small, limited the whole head in our runs). Both inputs are divided by their root mean square,
because embedding tables and latents are scaled very differently from one model family to the next.
"""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn


class SamplerHead(nn.Module):
    """Args: hidden size D; width of the hidden layer."""

    def __init__(self, hidden_size: int, width: int) -> None:
        super().__init__()
        self.first = nn.Linear(2 * hidden_size, width)
        self.norm = nn.LayerNorm(width)
        self.second = nn.Linear(width, hidden_size, bias=False)
        self.second.weight = mx.zeros_like(self.second.weight)

    def __call__(self, previous_embedding: mx.array, hidden: mx.array) -> mx.array:
        """Hidden state to unembed.

        Args:
            previous_embedding: [..., D] E[y_prev], the token just before the one predicted.
            hidden: [..., D] latent z of the slot, after the final norm.

        Returns:
            [..., D] in the dtype of `hidden`.
        """
        x = mx.concatenate([_unit_scale(previous_embedding), _unit_scale(hidden)], axis=-1)
        return hidden + self.second(self.norm(nn.silu(self.first(x.astype(hidden.dtype)))))


class NoSamplerHead(nn.Module):
    """Stands where the sampler head stands in an adapter without one: each slot is predicted by itself."""

    def __call__(self, previous_embedding: mx.array, hidden: mx.array) -> mx.array:
        """`hidden` as it is."""
        return hidden


def _unit_scale(x: mx.array) -> mx.array:
    """x divided by its root mean square over the last axis."""
    return mx.fast.rms_norm(x, None, 1e-6)
