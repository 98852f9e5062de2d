"""Uniforms that pick the tokens of a text, drawn inside the teacher's CDF interval of each token.

The uniform of a position is a multiple of 2^-24 for which the teacher's pick, by the inverse CDF, is the token of the
text. As in decoding, a position has one uniform, whatever blocks cover it. It depends on the batch and the seed only,
so a resumed run repeats it.
A token that the teacher's sampling cannot produce has no such uniform: it is not `reachable`.

Legend: S sequences, T padded length, Q teacher rows, M supervised rows.
"""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from mtp_mlx.decode.pick import Picker, SamplingConfig
from mtp_mlx.drafters.ptp.config import TeacherSampling
from mtp_mlx.drafters.ptp.uniform_embedding import FIXED_POINT_BITS
from mtp_mlx.drafters.slots.layout import SlotLayout
from mtp_mlx.drafters.slots.two_pass import Prefix
from mtp_mlx.metal_kernels.inverse_cdf import interval
from mtp_mlx.model.attach import AttachedModel

GRID = 2.0**FIXED_POINT_BITS
TEACHER_CHUNK = 256  # teacher rows whose logits over the whole vocabulary are in memory at once


def picker_of(teacher: TeacherSampling) -> Picker:
    """A picker by the inverse CDF of the teacher's sampling."""
    return Picker(
        SamplingConfig(
            temperature=teacher.temperature,
            top_k=teacher.top_k,
            top_p=teacher.top_p,
            min_p=teacher.min_p,
            noise="inverse-cdf",
        )
    )


@dataclass(frozen=True)
class TeacherRows:
    """What the base model predicts at the real rows that slots must match; constants.

    Attributes:
        rows: [Q] ascending indices into the S * T real rows.
        left, right: [Q] float64 ends of the CDF interval of the token after the row.
        likeliest: [Q] int32 most likely token after the row.
    """

    rows: np.ndarray
    left: np.ndarray
    right: np.ndarray
    likeliest: np.ndarray


def teacher_rows(attached: AttachedModel, layout: SlotLayout, prefix: Prefix, picker: Picker) -> TeacherRows:
    """The base model's predictions at every real row from an anchor to the last one that its slots must match.

    Args:
        picker: of the teacher's sampling.
    """
    rows = _covered(layout)
    flat = layout.tokens.reshape(-1)
    token = flat[np.minimum(rows + 1, len(flat) - 1)]
    edges, best = [], []
    for start in range(0, len(rows), TEACHER_CHUNK):
        own = slice(start, start + TEACHER_CHUNK)
        logits = attached.head(prefix.hidden[mx.array(rows[own])])  # [<= chunk, V]
        likeliest = mx.argmax(logits.astype(mx.float32), axis=-1)
        left, right = _edges(picker, logits, likeliest, mx.array(token[own]))
        mx.eval(left, right, likeliest)
        edges.append((np.array(left), np.array(right)))
        best.append(np.array(likeliest))
    left_edges, right_edges = (np.concatenate(side).astype(np.float64) for side in zip(*edges, strict=True))
    return TeacherRows(rows, left_edges, right_edges, np.concatenate(best).astype(np.int32))


def teacher_logits(
    attached: AttachedModel, hidden: mx.array, rows: np.ndarray, temperature: float
) -> tuple[mx.array, mx.array]:
    """What the base model predicts at real rows, evaluated.

    Args:
        hidden: [S * T, D] hidden states of all real rows.
        rows: [Q] indices into them.
        temperature: the teacher's.

    Returns:
        logits: [Q, C] of the draft columns.
        mass: [Q] float32, the probability of all draft columns together at the temperature.
    """
    ids, kept, masses = attached.draft_ids, [], []
    for start in range(0, len(rows), TEACHER_CHUNK):
        logits = attached.head(hidden[mx.array(rows[start : start + TEACHER_CHUNK])])  # [<= chunk, V]
        kept.append(logits if ids is None else logits[:, ids])
        masses.append(draft_mass(logits, ids, temperature))
        mx.eval(kept[-1], masses[-1])
    return mx.concatenate(kept), mx.concatenate(masses)


def draft_mass(logits: mx.array, ids: mx.array | None, temperature: float) -> mx.array:
    """The probability of all draft columns together, float32 [Q], by logits [Q, V] over the whole vocabulary."""
    if ids is None:
        return mx.ones(logits.shape[:1])
    scaled = logits.astype(mx.float32) / temperature
    return mx.exp(mx.logsumexp(scaled[:, ids], axis=-1) - mx.logsumexp(scaled, axis=-1))


def _edges(
    picker: Picker, logits: mx.array, likeliest: mx.array, token: mx.array
) -> tuple[mx.array, mx.array]:
    """Ends of the CDF intervals of `token` [Q]; at temperature 0, [0, 1) for the most likely token."""
    if picker.config.temperature == 0:
        return mx.zeros(token.shape), (likeliest == token).astype(mx.float32)
    return interval(picker.scores(logits), token)


def _covered(layout: SlotLayout) -> np.ndarray:
    """Ascending indices of the real rows from each anchor to the row before the last token of its block."""
    sequences, length = layout.tokens.shape
    covered = np.zeros((sequences, length), dtype=bool)
    real = np.zeros(layout.anchors.shape, dtype=bool)  # blocks that train something
    sequence, row = np.divmod(layout.rows, layout.block.shape[1])
    real[sequence, layout.block[sequence, row]] = True
    for offset in range(layout.slots + 1 - layout.lead):  # from the anchor to anchor + drafts of the longest
        row = layout.anchors + offset
        inside = real & (offset <= layout.lengths - layout.lead) & (row < length - 1)
        sequence = np.broadcast_to(np.arange(sequences)[:, None], row.shape)
        covered[sequence[inside], row[inside]] = True
    return np.flatnonzero(covered.reshape(-1))


@dataclass(frozen=True)
class TextUniforms:
    """Uniforms of the tokens of a batch.

    Attributes:
        values: [S, T] float32 uniform of the token at each position; 0 where no teacher row predicts it.
        reachable: [S, T] bool: the uniform picks the token.
        greedy: [S, T] bool: the token is the teacher's most likely one.
    """

    values: np.ndarray
    reachable: np.ndarray
    greedy: np.ndarray


def text_uniforms(
    layout: SlotLayout, teacher: TeacherRows, beta: float, seed: tuple[int, ...]
) -> TextUniforms:
    """Draws a uniform for every token that a teacher row predicts.

    Args:
        beta: distribution within the interval, Beta(beta, beta): 1 is uniform, below 1 favours the ends.
        seed: of NumPy's generator.
    """
    shape = layout.tokens.shape
    place = np.random.default_rng(seed).beta(beta, beta, shape).reshape(-1)
    position = teacher.rows + 1  # of the token after the row
    values, reachable = np.zeros(place.shape, dtype=np.float32), np.zeros(place.shape, dtype=bool)
    greedy = np.zeros(place.shape, dtype=bool)
    values[position], reachable[position] = drawn_inside(teacher.left, teacher.right, place[position])
    greedy[position] = layout.tokens.reshape(-1)[position] == teacher.likeliest
    return TextUniforms(values.reshape(shape), reachable.reshape(shape), greedy.reshape(shape))


def drawn_inside(left: np.ndarray, right: np.ndarray, place: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(uniforms float32 [n], whether there is one bool [n]) on the grid of decoding, inside [left, right).

    Args:
        left, right: [n] float64 ends of CDF intervals.
        place: [n] place inside the interval, in [0, 1).
    """
    first, end = np.ceil(left * GRID), np.ceil(right * GRID)  # grid points of [left, right)
    drawn = np.floor((left + (right - left) * place) * GRID)
    drawn = np.clip(np.clip(drawn, first, np.maximum(end - 1, first)), 0, GRID - 1)
    return (drawn / GRID).astype(np.float32), end > first


def carried_uniforms(layout: SlotLayout, values: np.ndarray) -> np.ndarray:
    """The uniform that each slot row carries, float32 [S * chunks, C].

    With a lead it is the uniform of the token that the row predicts, without one that of the token at its position.

    Args:
        values: [S, T] uniforms of the text.
    """
    sequences, length = values.shape
    position = layout.positions().reshape(sequences, -1) + layout.lead
    carried = np.take_along_axis(values, np.minimum(position, length - 1), axis=1)
    return carried.reshape(-1, layout.chunk_rows)


def known_so_far(layout: SlotLayout, known: np.ndarray, own: bool) -> np.ndarray:
    """Whether `known` [S, T] holds for every token between its anchor and the token of a supervised row, bool [M].

    Args:
        own: include the token of the row itself.
    """
    sequences, length = known.shape
    sequence = layout.rows // layout.block.shape[1]
    predicted = layout.target - sequence * length + 1  # position of the token
    anchor = predicted - layout.depth - 1
    unknown = np.concatenate([np.zeros((sequences, 1), dtype=int), np.cumsum(~known, axis=1)], axis=1)
    upto = predicted + 1 if own else predicted
    return unknown[sequence, upto] == unknown[sequence, anchor + 1]
