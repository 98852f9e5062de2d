"""What every mask-token objective is given and what it returns."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

import mlx.core as mx
import mlx.nn as nn
from mlx.nn.utils import checkpoint

from mtp_mlx.model.attach import AttachedModel


@dataclass(frozen=True)
class SlotBatch:
    """Supervised rows of one step. M slot rows, Q teacher rows, D hidden size, C columns of the draft head.

    Attributes:
        hidden: [M, D] slot latents after the final norm; carries gradients.
        depth: [M] int32, 1-based slot.
        weight: [M] float32, weight of each row's loss.
        teacher_row: [M] int32 index into the teacher rows: the real row that predicts the same token.
        previous: [M] int32 token before the predicted one.
        label: [M] int32 column of the draft head of the token that really followed, -1 if it has none.
        teacher_hidden: [Q, D] base latents of the teacher rows; constants.
        teacher_probs: [Q, C] base probabilities (over the whole vocabulary) of the draft columns; constants.
        teacher_previous: [Q] int32 token at each teacher row.
        teacher_label: [Q] int32 column of the token after it, -1 if it has none.
    """

    hidden: mx.array
    depth: mx.array
    weight: mx.array
    teacher_row: mx.array
    previous: mx.array
    label: mx.array
    teacher_hidden: mx.array
    teacher_probs: mx.array
    teacher_previous: mx.array
    teacher_label: mx.array


@dataclass
class LossParts:
    """A loss and the named parts it is made of (all float32 scalars)."""

    total: mx.array
    parts: dict[str, mx.array] = field(default_factory=dict)


class Objective(Protocol):
    """batch -> loss."""

    def __call__(self, attached: AttachedModel, batch: SlotBatch) -> LossParts: ...


def sum_over_chunks(
    rows_loss: Callable[..., mx.array], chunk_rows: int, *arrays: mx.array, trained: nn.Module | None = None
) -> mx.array:
    """Sum of `rows_loss(*chunk)` over chunks of rows, so that logits of one chunk at a time exist.

    Args:
        rows_loss: maps row-wise arrays [m, ...] to a scalar sum; only the first may carry gradients.
        chunk_rows: rows per chunk; with more rows than this each chunk's logits are recomputed in the
            backward pass instead of kept.
        arrays: [M, ...] each.
        trained: module whose parameters `rows_loss` uses and that needs gradients; recomputation follows
            gradients only to inputs it is told about.
    """
    rows = arrays[0].shape[0]
    if rows <= chunk_rows:
        return rows_loss(*arrays)

    def chunk(start: int) -> mx.array:
        hidden, *constants = (array[start : start + chunk_rows] for array in arrays)

        def loss(hidden: mx.array) -> mx.array:  # indices are no inputs: they have no gradient
            return rows_loss(hidden, *constants)

        return (mx.checkpoint(loss) if trained is None else checkpoint(trained, loss))(hidden)

    return mx.sum(mx.stack([chunk(start) for start in range(0, rows, chunk_rows)]))


def soft_cross_entropy(logits: mx.array, probs: mx.array) -> mx.array:
    """-sum_c probs_c log softmax(logits)_c per row: [m, C], [m, C] -> [m] float32.

    `probs` may sum to less than one (the rest of the vocabulary cannot be drafted).
    """
    logits = logits.astype(mx.float32)
    return mx.sum(probs, axis=-1) * mx.logsumexp(logits, axis=-1) - mx.sum(probs * logits, axis=-1)


def hard_cross_entropy(logits: mx.array, label: mx.array) -> mx.array:
    """-log softmax(logits)[label] per row, zero where label is -1: [m, C], [m] -> [m] float32."""
    logits = logits.astype(mx.float32)
    chosen = mx.take_along_axis(logits, mx.maximum(label, 0)[:, None], axis=-1)[:, 0]
    return mx.where(label >= 0, mx.logsumexp(logits, axis=-1) - chosen, 0.0)
