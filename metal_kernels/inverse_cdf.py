"""Picks by the inverse CDF in vocabulary order, and the interval of uniforms that picks a given token.

The pick of a row is the first column with mass whose cumulative mass exceeds the uniform times the total mass
(arXiv 2512.21323: Pick(u, P) = min {j : F_j > u}). If rounding leaves no such column, it is the last column with
mass, so the last edge is 1. Columns without mass have empty intervals. All numbers are float32; sums run block by
block, because a single long float32 sum would be off by 1e-5 of the total.

A row's result does not depend on the other rows or on their number: columns are padded to whole blocks before any
element-wise function, because vectorised and scalar code may differ in the last bit.

Legend: R rows, V columns, P columns padded to a multiple of BLOCK.
"""

from __future__ import annotations

import mlx.core as mx

BLOCK = 256  # columns summed at a time
SPREAD = 0.05  # by how much the running sums of a drafter and of its target are apart, about


def _masses(scores: mx.array) -> mx.array:
    """[R, V] scores -> [R, P] unnormalised probabilities, the largest 1, zero in the padding and for NaN."""
    scores = mx.where(mx.isnan(scores), -mx.inf, scores.astype(mx.float32))
    scores = mx.pad(scores, [(0, 0), (0, -scores.shape[-1] % BLOCK)], constant_values=-mx.inf)
    top = mx.max(scores, axis=-1, keepdims=True)
    mass = mx.where(scores == top, 1.0, mx.exp(scores - top))
    return mx.where(scores > -mx.inf, mass, 0.0)


def _running_sum(mass: mx.array) -> mx.array:
    """Running sums along the rows of [R, P]."""
    n_rows, n_columns = mass.shape
    within = mx.cumsum(mass.reshape(n_rows, -1, BLOCK), axis=-1)
    before = mx.cumsum(within[:, :, -1], axis=-1, inclusive=False)
    return (within + before[:, :, None]).reshape(n_rows, n_columns)


def inverse_cdf(scores: mx.array, uniforms: mx.array) -> mx.array:
    """The picked column of each row, int32 [R].

    scores    [R, V] any float type; their softmax is the distribution. NaN and -inf have no mass; a row without
              any mass gives column 0.
    uniforms  [R] float32 in [0, 1)
    """
    mass = _masses(scores)
    through = _running_sum(mass)
    n_columns = mass.shape[-1]
    columns = mx.arange(n_columns)
    crosses = (mass > 0) & (through > uniforms[:, None] * through[:, -1:])
    first = mx.min(mx.where(crosses, columns, n_columns), axis=-1)
    last = mx.max(mx.where(mass > 0, columns, 0), axis=-1)
    return mx.where(first < n_columns, first, last).astype(mx.int32)


def blurred(scores: mx.array, uniforms: mx.array) -> mx.array:
    """The chance of each column to be picked where running sums are not known exactly, float32 [R, V].

    The uniform is spread by a Cauchy distribution of width SPREAD, whose tails leave a chance to columns with much
    mass far from it. Rows are not normalised.

    scores, uniforms  as for `inverse_cdf`
    """
    through = _running_sum(_masses(scores))[:, : scores.shape[-1]]
    ends = mx.concatenate([mx.zeros((through.shape[0], 1)), through / through[:, -1:]], axis=-1)
    reached = mx.arctan((ends - uniforms[:, None]) / SPREAD)
    return mx.maximum(reached[:, 1:] - reached[:, :-1], 0.0)


def interval(scores: mx.array, columns: mx.array) -> tuple[mx.array, mx.array]:
    """Left and right edge of the interval of uniforms that picks a column, float32 [R] each, in [0, 1].

    If the edges are equal, the column has no mass (or less than float32 can resolve), and no uniform picks it.

    scores   [R, V] as in `inverse_cdf`
    columns  [R] integers, a column of each row
    """
    mass = _masses(scores)
    through = _running_sum(mass)
    column = columns.astype(mx.int32)[:, None]
    right = mx.take_along_axis(through, column, axis=-1)[:, 0]
    before = mx.take_along_axis(through, mx.maximum(column - 1, 0), axis=-1)[:, 0]
    left = mx.where(columns > 0, before, 0.0)
    own = mx.take_along_axis(mass, column, axis=-1)[:, 0]
    total = through[:, -1]
    right = mx.where(own > 0, mx.maximum(right, left), left)
    return left / total, right / total
