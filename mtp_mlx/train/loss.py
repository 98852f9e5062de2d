"""Parts that the losses of several methods are made of: cross-entropies, and sums over chunks of rows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import mlx.core as mx
import mlx.nn as nn
from mlx.nn.utils import checkpoint

LEAST = -1e30  # logits below it are raised to it; exp of it is zero


@dataclass
class LossParts:
    """A loss and its named parts, float32 scalars."""

    total: mx.array
    parts: dict[str, mx.array] = field(default_factory=dict)


def sum_over_chunks(
    rows_loss: Callable[..., mx.array], chunk_rows: int, *arrays: mx.array, trained: nn.Module | None = None
) -> mx.array:
    """Sum of `rows_loss(*chunk)` over chunks of rows, with the logits of one chunk in memory at a time.

    Args:
        rows_loss: maps row-wise arrays [m, ...] to a scalar sum; only the first array may carry gradients.
        chunk_rows: rows per chunk. If there are more rows, the backward pass computes each chunk's logits again.
        arrays: [M, ...] each.
        trained: module whose parameters `rows_loss` uses, if it is trained too: recomputation passes gradients
            only to inputs that it knows of.
    """
    rows = arrays[0].shape[0]
    if rows <= chunk_rows:
        return rows_loss(*arrays)

    def chunk(start: int) -> mx.array:
        hidden, *constants = (array[start : start + chunk_rows] for array in arrays)

        def loss(hidden: mx.array) -> mx.array:  # constants are captured: integer inputs have no gradient
            return rows_loss(hidden, *constants)

        return (mx.checkpoint(loss) if trained is None else checkpoint(trained, loss))(hidden)

    return mx.sum(mx.stack([chunk(start) for start in range(0, rows, chunk_rows)]))


def finite(logits: mx.array) -> mx.array:
    """Logits in float32, without the -inf that some models give ids which they never write (phi3small).

    The probability stays zero, and zero times a number, unlike zero times -inf, is zero.
    """
    return mx.maximum(logits.astype(mx.float32), LEAST)


def soft_cross_entropy(logits: mx.array, probs: mx.array) -> mx.array:
    """-sum_c probs_c log softmax(logits)_c per row: [m, C], [m, C] -> [m] float32.

    `probs` may sum to less than 1: the rest is probability of ids outside the draft vocabulary.
    """
    logits = finite(logits)
    return mx.sum(probs, axis=-1) * mx.logsumexp(logits, axis=-1) - mx.sum(probs * logits, axis=-1)


def hard_cross_entropy(logits: mx.array, label: mx.array) -> mx.array:
    """-log softmax(logits)[label] per row, 0 where `label` is -1: [m, C], [m] -> [m] float32."""
    logits = logits.astype(mx.float32)
    chosen = mx.take_along_axis(logits, mx.maximum(label, 0)[:, None], axis=-1)[:, 0]
    return mx.where(label >= 0, mx.logsumexp(logits, axis=-1) - chosen, 0.0)
