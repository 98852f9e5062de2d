"""Calls of verify_tail for its tests, and what a right answer is, in float64."""

from __future__ import annotations

import mlx.core as mx
import numpy as np

from mtp_mlx.metal_kernels import verify_tail
from mtp_mlx.metal_kernels.launch import Launch
from mtp_mlx.metal_kernels.position_noise import gumbel_of_keys, row_keys, uniform_bits
from mtp_mlx.metal_kernels.verify_tail import CDF_ERROR
from tests.metal_kernels import emulated

DTYPES = (mx.float32, mx.float16, mx.bfloat16)
MODES = verify_tail.MODE_NAMES
TEMPERATURE = 0.7
SCORE_ERROR = 2e-5  # of logit / temperature + gumbel in float32, for scores up to 40 in size
LARGEST_UNIFORM = 1 - 2.0**-24


def outputs(launch: Launch) -> list[np.ndarray]:
    """The outputs, the same under three schedules."""
    runs = [emulated.run(launch, schedule) for schedule in emulated.SCHEDULES]
    first, *others = [[np.array(output) for output in run] for run in runs]
    for other in others:
        for one, two in zip(first, other, strict=True):
            np.testing.assert_array_equal(one, two)
    return first


def picks_and_accepted(arguments: verify_tail.Arguments) -> tuple[np.ndarray, int]:
    (result,) = outputs(verify_tail.launch(*arguments))
    return result[:-1], int(result[-1])


def double(array: mx.array) -> np.ndarray:
    return np.array(array.astype(mx.float32)).astype(np.float64)


def leading_run(picks: np.ndarray, tokens: np.ndarray) -> int:
    """Drafts accepted, one comparison at a time."""
    for row, draft in enumerate(tokens[1:]):
        if picks[row] != draft:
            return row
    return len(picks) - 1


def case(
    mode: str, n_rows: int, n_columns: int, dtype: mx.Dtype, seed: int, n_right: int = 2
) -> verify_tail.Arguments:
    """Random logits; the first `n_right` drafts are the reference's own picks."""
    generator = np.random.default_rng(seed)
    logits = mx.array(generator.normal(size=(n_rows, n_columns)).astype(np.float32) * 3).astype(dtype)
    temperature, noise = 0.0, None
    if mode != "greedy":
        temperature = TEMPERATURE
        noise = mx.array(generator.uniform(size=n_rows).astype(np.float32) * LARGEST_UNIFORM)
    if mode == "gumbel":
        noise = row_keys(seed, mx.arange(n_rows) + 100)
    picks, _ = verify_tail.reference(logits, mx.zeros((n_rows,), dtype=mx.int32), temperature, noise)
    tokens = np.concatenate([[5], np.array(picks)[:-1]]).astype(np.int32)
    tokens[1 + n_right :] = (tokens[1 + n_right :] + 1) % n_columns
    return logits, mx.array(tokens), temperature, noise, ()


def assert_picks_are_right(arguments: verify_tail.Arguments, picks: np.ndarray) -> None:
    """Every pick is the float64 pick, or within the stated bound of being it."""
    logits, _, temperature, noise, _ = arguments
    scores = double(logits) / (temperature or 1.0)
    rows = np.arange(len(picks))
    if noise is not None and noise.dtype == mx.float32:
        mass = np.exp(scores - scores.max(-1, keepdims=True))
        through = np.cumsum(mass / mass.sum(-1, keepdims=True), axis=-1)
        uniforms = double(noise)
        below = np.where(picks > 0, through[rows, np.maximum(picks - 1, 0)], 0)
        assert (below - CDF_ERROR <= uniforms).all() and (uniforms <= through[rows, picks] + CDF_ERROR).all()
        assert (mass[rows, picks] > 0).all()
        return
    if noise is not None:
        bits = np.array(uniform_bits(noise, mx.arange(logits.shape[1]))).astype(np.float64)
        scores = scores - np.log(-np.log1p(-(bits + 0.5) / 2**32))
    bound = 0.0 if noise is None else SCORE_ERROR
    assert (scores[rows, picks] >= scores.max(-1) - bound).all()
    runner_up = np.partition(scores, -2, axis=-1)[:, -2]
    clear = scores.max(-1) - runner_up > 2 * bound
    np.testing.assert_array_equal(picks[clear], scores.argmax(-1)[clear])


def neck_and_neck(keys: mx.array, n_columns: int) -> np.ndarray:
    """Scaled logits, [R, V], with which every column's noisy score beats all lower ones by next to nothing."""
    noise = np.array(gumbel_of_keys(keys, mx.arange(n_columns)))
    return np.linspace(1, 1.2, n_columns, dtype=np.float32) - noise
