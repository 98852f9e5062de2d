"""At temperature 0 an exact pick is mlx-lm's to the last bit, in every precision, with any penalties and rows; the
penalties are mlx-lm's to the last bit without `exact` too."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.sample_utils import greedy_sampler, make_logits_processors

from mtp_mlx.decode.pick import Picker, SamplingConfig

VOCABULARY, ROWS = 501, 24
HALVES = [mx.bfloat16, mx.float16]
SPREAD = {mx.float32: 1e-6, mx.bfloat16: 0.05, mx.float16: 5e-3}
PENALTIES: list[dict[str, Any]] = [
    {},
    {"repetition_penalty": 1.3},
    {"presence_penalty": 0.5, "presence_context_size": 7},
    {"frequency_penalty": 0.3},
    {"repetition_penalty": 1.2, "presence_penalty": -0.3, "frequency_penalty": 0.2},
]


def crowded(seed: int, dtype: mx.Dtype) -> mx.array:
    """[ROWS, V] logits, of which several are near the largest, and the last tie with it only after rounding."""
    rng = np.random.default_rng(seed)
    logits = 0.4 * rng.normal(size=(ROWS, VOCABULARY)).astype(np.float32)
    places = rng.integers(0, VOCABULARY, (ROWS, 6))
    np.put_along_axis(
        logits, places, (1.5 + SPREAD[dtype] * rng.random((ROWS, 6))).astype(np.float32), axis=1
    )
    return mx.array(logits).astype(dtype)


def mlx_lm_pick(logits: mx.array, tokens: mx.array, penalties: dict[str, Any]) -> int:
    """What `mlx_lm.generate.generate_step` does with the logits [1, V] of its newest row."""
    for processor in make_logits_processors(**penalties):
        logits = processor(tokens, logits)
    token: Any = greedy_sampler(logits - mx.logsumexp(logits, keepdims=True)).item()
    return int(token)


def histories(seed: int, logits: mx.array) -> np.ndarray:
    """[ROWS, 30] tokens; the likeliest are among them, some of them several times."""
    likely = np.argsort(-np.array(logits.astype(mx.float32)), axis=1)[:, :12]
    rng = np.random.default_rng(seed)
    return np.take_along_axis(likely, rng.integers(0, 12, (ROWS, 30)), axis=1).astype(np.int32)


@pytest.mark.parametrize("penalties", PENALTIES)
@pytest.mark.parametrize("dtype", [mx.float32, *HALVES])
@pytest.mark.parametrize("seed", range(3))
def test_the_pick_is_mlx_lm_s(seed: int, dtype: mx.Dtype, penalties: dict[str, Any]) -> None:
    logits, picker = crowded(seed, dtype), Picker(SamplingConfig(**penalties), exact=True)
    tokens = histories(seed, logits)
    expected = [
        mlx_lm_pick(mx.array(logits[row : row + 1]), mx.array(tokens[row]), penalties) for row in range(ROWS)
    ]
    picks = picker.pick(logits, mx.arange(ROWS), mx.array(tokens))
    assert picks.tolist() == expected
    short = [mlx_lm_pick(mx.array(logits[row : row + 1]), mx.array([3]), penalties) for row in range(ROWS)]
    padded = np.full((ROWS, max(picker.history_size, 1)), -1, dtype=np.int32)
    padded[:, -1] = 3
    assert picker.pick(logits, mx.arange(ROWS), mx.array(padded)).tolist() == short


@pytest.mark.parametrize("dtype", HALVES)
def test_rounding_decides_in_half_precision(dtype: mx.Dtype) -> None:
    """The law above is not empty: the likeliest token of many rows is not the one that mlx-lm picks."""
    logits = crowded(0, dtype)
    picks = Picker(exact=True).pick(logits, mx.arange(ROWS))
    assert mx.sum(picks != mx.argmax(logits, axis=-1)).item() >= 3


@pytest.mark.parametrize("dtype", HALVES)
def test_a_row_s_pick_does_not_depend_on_the_others(dtype: mx.Dtype) -> None:
    logits, picker = crowded(1, dtype), Picker(exact=True)
    together = picker.pick(logits, mx.arange(ROWS)).tolist()
    alone = [picker.pick(logits[row : row + 1], mx.array([row])).item() for row in range(ROWS)]
    assert together == alone


@pytest.mark.parametrize("penalties", PENALTIES[1:])
@pytest.mark.parametrize("dtype", [mx.float32, *HALVES])
def test_penalties_are_mlx_lm_s_to_the_last_bit(dtype: mx.Dtype, penalties: dict[str, Any]) -> None:
    logits, picker = crowded(2, dtype), Picker(SamplingConfig(**penalties))
    tokens = histories(2, logits)
    ours = picker.scores(logits, mx.array(tokens))
    for row in range(ROWS):
        theirs = mx.array(logits[row : row + 1])
        for processor in make_logits_processors(**penalties):
            theirs = processor(mx.array(tokens[row]), theirs)
        assert mx.array_equal(ours[row], theirs[0].astype(mx.float32)).item()
