"""Calls of lm_head_pick for its tests, and what a right answer is, in float64."""

from __future__ import annotations

from collections.abc import Callable

import mlx.core as mx
import numpy as np

from mtp_mlx.metal_kernels import lm_head_pick
from mtp_mlx.metal_kernels.launch import Launch
from mtp_mlx.metal_kernels.position_noise import row_keys, uniform_bits
from tests.metal_kernels import emulated

DTYPES = (mx.float32, mx.float16, mx.bfloat16)
KINDS = ((0, 0), (32, 4), (64, 4), (128, 4), (32, 8), (64, 8), (128, 8))  # group size, bits; (0, 0) is dense
NOISE_ERROR = 2e-5  # of score + gumbel in float32, for scores up to 40 in size
DOT_ERROR = 1e-6  # of a float32 dot product, as a share of the sum of its products' sizes


def double(array: mx.array) -> np.ndarray:
    return np.array(array.astype(mx.float32)).astype(np.float64)


def dense_weight(arguments: lm_head_pick.Arguments) -> np.ndarray:
    """[V, D] float64, unpacked here."""
    _, weight, scales, biases, group_size, bits, *_ = arguments
    if scales is None:
        return double(weight)
    words = np.array(weight)
    values = (words[:, :, None] >> np.arange(0, 32, bits, dtype=np.uint32)) & (2**bits - 1)
    values = values.reshape(len(words), -1).astype(np.float64)
    return values * np.repeat(double(scales), group_size, 1) + np.repeat(double(biases), group_size, 1)


def case(
    n_rows: int,
    n_columns: int,
    size: int,
    dtype: mx.Dtype,
    kind: tuple[int, int],
    temperature: float = 0.0,
    reduced: bool = False,
    seed: int = 0,
) -> lm_head_pick.Arguments:
    """Random arguments with scores of size 3."""
    generator = np.random.default_rng(seed)
    hidden = mx.array(generator.normal(size=(n_rows, size)).astype(np.float32)).astype(dtype)
    spread = 3 * size**-0.5
    weight = mx.array((generator.normal(size=(n_columns, size)) * spread).astype(np.float32)).astype(dtype)
    keys = row_keys(seed, mx.arange(n_rows) + 9) if temperature else None
    ids = mx.array(generator.permutation(4 * n_columns)[:n_columns].astype(np.int32)) if reduced else None
    if not kind[1]:
        return hidden, weight, None, None, 0, 0, temperature, keys, ids
    return hidden, *mx.quantize(weight, *kind), *kind, temperature, keys, ids


def two_launches(
    arguments: lm_head_pick.Arguments, run: Callable[[Launch], list[mx.array]]
) -> tuple[np.ndarray, np.ndarray]:
    values, columns = run(lm_head_pick.launch_parts(*arguments))
    merge = lm_head_pick.launch_merge(values, columns, arguments[1].shape[0], arguments[8])
    picks, confidence = run(merge)
    return np.array(picks), np.array(confidence)


def outputs(
    arguments: lm_head_pick.Arguments, schedules: tuple[tuple[str, int], ...] = emulated.SCHEDULES
) -> tuple[np.ndarray, np.ndarray]:
    """Picks and confidence, the same under every schedule."""
    first, *others = [
        two_launches(arguments, lambda launch: emulated.run(launch, schedule))  # noqa: B023
        for schedule in schedules
    ]
    for other in others:
        np.testing.assert_array_equal(first[0], other[0])
        np.testing.assert_array_equal(first[1], other[1])
    return first


def assert_right(arguments: lm_head_pick.Arguments, picks: np.ndarray, confidence: np.ndarray) -> None:
    """Every pick has the largest float64 score to within the stated bound; likewise its probability."""
    hidden, _, _, _, _, _, temperature, keys, token_ids = arguments
    weight = dense_weight(arguments)
    inverse = 1 / temperature if temperature else 1.0
    scores = double(hidden) @ weight.T * inverse
    bound = DOT_ERROR * (np.abs(double(hidden)) @ np.abs(weight).T).max(-1) * inverse
    noisy = scores
    ids = np.arange(len(weight)) if token_ids is None else np.array(token_ids)
    if keys is not None:
        bits = np.array(uniform_bits(keys, mx.array(ids))).astype(np.float64)
        noisy = scores - np.log(-np.log1p(-(bits + 0.5) / 2**32))
        bound = bound + NOISE_ERROR
    rows = np.arange(len(picks))
    column_of = {int(token): column for column, token in enumerate(ids)}
    columns = np.array([column_of[int(pick)] for pick in picks])
    assert (noisy[rows, columns] >= noisy.max(-1) - 2 * bound).all()
    runner_up = np.partition(noisy, -2, axis=-1)[:, -2]
    clear = noisy.max(-1) - runner_up > 2 * bound
    np.testing.assert_array_equal(columns[clear], noisy.argmax(-1)[clear])
    exact = np.exp(scores[rows, columns] - np.logaddexp.reduce(scores, axis=-1))
    assert (np.abs(confidence / exact - 1) <= 2 * bound + 1e-5).all()
