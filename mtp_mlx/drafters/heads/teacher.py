"""What the model's main head teaches: its likely draft columns, and how much of its probability these hold.

Legend: S sequences, T padded length, D hidden size, Q teacher rows, C columns of the draft head, V vocabulary.
"""

from __future__ import annotations

import mlx.core as mx

from mtp_mlx.drafters.heads.layout import HeadLayout
from mtp_mlx.drafters.heads.loss import MTPDistil, TeacherTop
from mtp_mlx.model.attach import AttachedModel

CHUNK = 256  # rows whose logits are in memory at once


def teacher_targets(
    attached: AttachedModel,
    hidden: mx.array,
    layout: HeadLayout,
    distil: MTPDistil,
    normaliser: mx.array | None = None,
) -> TeacherTop | None:
    """The main head's most likely draft columns at the Q teacher rows, evaluated; None without distillation.

    Args:
        hidden: [S, T, D] of the trunk, after its final norm.
        normaliser: [S, T] of all rows, as `normaliser_of` gives it at temperature 1, or None. With it only the draft
            columns are computed; at another temperature it is of no use.
    """
    if not distil.kl_weight:
        return None
    rows = mx.array(layout.teacher_rows)
    states = _for_head(attached, hidden.reshape(-1, hidden.shape[-1])[rows])  # [Q, D]
    known = normaliser.reshape(-1)[rows] if normaliser is not None and distil.temperature == 1 else None
    pieces = []
    for start in range(0, states.shape[0], CHUNK):
        own = slice(start, start + CHUNK)
        if known is not None:
            pieces.append(distil.teacher(attached.draft_head(states[own]), known[own]))
        else:
            logits, ids = attached.head(states[own]), attached.draft_ids  # [<= chunk, V]
            drafted = logits if ids is None else logits[:, ids]
            pieces.append(distil.teacher(drafted, _log_sum(logits, distil.temperature)))
        mx.eval(pieces[-1].arrays())
    top = TeacherTop.joined(pieces)
    mx.eval(top.arrays())
    return top


def normaliser_of(attached: AttachedModel, hidden: mx.array) -> mx.array:
    """Log of the sum of exp(logit) over the whole vocabulary, float32 [Q], of hidden states [Q, D]; evaluated."""
    states, pieces = _for_head(attached, hidden), []
    for start in range(0, states.shape[0], CHUNK):
        pieces.append(_log_sum(attached.head(states[start : start + CHUNK]), 1.0))
        mx.eval(pieces[-1])
    found = mx.concatenate(pieces)
    mx.eval(found)
    return found


def _for_head(attached: AttachedModel, states: mx.array) -> mx.array:
    """States in the type of the model's own."""
    return states.astype(attached.embed(mx.zeros((1,), dtype=mx.int32)).dtype)


def _log_sum(logits: mx.array, temperature: float) -> mx.array:
    return mx.logsumexp(logits.astype(mx.float32) / temperature, axis=-1)
