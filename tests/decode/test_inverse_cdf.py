"""Picks by the inverse CDF: the warped softmax's marginal, one uniform per position, rows that do not depend on the
block, and the definition of the kernel `verify_tail`, bit for bit."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mtp_mlx.decode.pick import Picker, SamplingConfig
from mtp_mlx.errors import MTPError
from mtp_mlx.metal_kernels import verify_tail
from mtp_mlx.metal_kernels.inverse_cdf import SPREAD, blurred, interval, inverse_cdf
from mtp_mlx.metal_kernels.position_noise import position_uniforms
from tests.decode.test_pick import VOCABULARY, WARPS, assert_marginal, counted, logits_of, warped_softmax


def naive_pick(scores: np.ndarray, uniform: float) -> int:
    """min {j : F_j > u} in float64."""
    scores = scores.astype(np.float64)
    mass = np.exp(scores - scores[np.isfinite(scores)].max())
    through = np.cumsum(np.where(np.isfinite(scores), mass, 0.0))
    return int(np.flatnonzero(through > uniform * through[-1])[0])


@pytest.mark.parametrize("warp", WARPS)
def test_marginal_over_positions_is_the_warped_softmax(warp: str) -> None:
    config = SamplingConfig(seed=2**40 + 7, noise="inverse-cdf", **WARPS[warp])
    logits = logits_of(1)
    ids = Picker(config).pick(mx.broadcast_to(mx.array(logits), (20_000, VOCABULARY)), mx.arange(20_000))
    assert_marginal(counted(ids), warped_softmax(logits[0], config))


def test_uniforms_are_even_and_on_the_grid() -> None:
    """24 bits of a counter-based generator: in [0, 1), even, and one number for (seed, position) in any call."""
    drawn = np.array(position_uniforms(3, mx.arange(50_000))).astype(np.float64)
    assert drawn.min() >= 0 and drawn.max() < 1 and (drawn * 2**24 == np.floor(drawn * 2**24)).all()
    assert_marginal(np.histogram(drawn, 64, (0, 1))[0], np.full(64, 1 / 64))
    pairs = np.histogram2d(drawn[:-1], drawn[1:], 8, ((0, 1), (0, 1)))[0].ravel()
    assert_marginal(pairs, np.full(64, 1 / 64))
    alone = position_uniforms(3, mx.array([[70], [4]]))
    assert alone.shape == (2, 1) and alone[1, 0].item() == drawn[4]
    assert position_uniforms(4, mx.array([4])).item() != drawn[4]


@settings(deadline=None, max_examples=60)
@given(seed=st.integers(0, 2**31), rows=st.integers(1, 6), columns=st.integers(2, 700), warp=st.booleans())
def test_pick_and_interval_agree_with_a_float64_cumulative_sum(
    seed: int, rows: int, columns: int, warp: bool
) -> None:
    rng = np.random.default_rng(seed)
    scores = (rng.normal(size=(rows, columns)) * 3).astype(np.float32)
    scores[rng.random(scores.shape) < 0.3] = -np.inf if warp else -30.0
    scores[:, rng.integers(columns)] = 1.0
    uniforms = rng.random(rows).astype(np.float32)
    picked = np.array(inverse_cdf(mx.array(scores), mx.array(uniforms)))
    left, right = (np.array(edge) for edge in interval(mx.array(scores), mx.array(picked)))
    assert (left <= uniforms).all() and (uniforms < right).all()
    for row in range(rows):
        near_edge = min(abs(uniforms[row] - left[row]), abs(uniforms[row] - right[row])) < 1e-6
        assert near_edge or picked[row] == naive_pick(scores[row], float(uniforms[row]))


def test_edges() -> None:
    """Empty bins are never picked, the last edge is 1, and a token without mass has an empty interval."""
    scores = mx.array([[-mx.inf, 0.0, -mx.inf, 0.0, -mx.inf]] * 3)
    uniforms = mx.array([0.0, 0.5, 1 - 2.0**-24])
    assert inverse_cdf(scores, uniforms).tolist() == [1, 3, 3]
    left, right = interval(scores, mx.array([1, 3, 4]))
    assert left.tolist() == [0.0, 0.5, 1.0] and right.tolist() == [0.5, 1.0, 1.0]
    assert inverse_cdf(mx.full((1, 4), -mx.inf), mx.array([0.3])).item() == 0


@settings(deadline=None, max_examples=40)
@given(data_seed=st.integers(0, 2**31), rows=st.integers(2, 6), warp=st.sampled_from(list(WARPS.values())))
def test_a_rows_pick_does_not_depend_on_the_block(data_seed: int, rows: int, warp: dict[str, float]) -> None:
    picker = Picker(SamplingConfig(seed=data_seed, noise="inverse-cdf", **warp))  # type: ignore[arg-type]
    logits, positions = mx.array(logits_of(data_seed, rows, 157)), mx.arange(rows) + 11
    together = picker.pick(logits, positions)
    alone = mx.concatenate([picker.pick(logits[i : i + 1], positions[i : i + 1]) for i in range(rows)])
    assert mx.array_equal(together, alone)


def test_masses_have_the_same_bits_in_any_block() -> None:
    """The vectorised and the scalar form of exp may differ in the last bit; padding keeps every row in the first."""
    from mtp_mlx.metal_kernels.inverse_cdf import _masses

    logits = mx.array(logits_of(3, 5, 157))
    together = _masses(logits)
    for row in range(5):
        assert mx.array_equal(together[row : row + 1], _masses(logits[row : row + 1]))


@pytest.mark.parametrize("temperature", [0.3, 1.0])
def test_the_picker_is_the_kernels_reference_bit_for_bit(temperature: float) -> None:
    logits, positions = mx.array(logits_of(5, 9, 1009)), mx.arange(9) + 100
    config = SamplingConfig(temperature=temperature, seed=8, noise="inverse-cdf")
    uniforms = position_uniforms(8, positions)
    drafts = mx.zeros((9,), dtype=mx.int32)
    picks, _ = verify_tail.reference(logits, drafts, temperature, uniforms)
    assert mx.array_equal(Picker(config).pick(logits, positions), picks)


def test_a_reduced_vocabulary_keeps_its_order() -> None:
    """Columns that stand for ascending ids: the pick is that of the whole vocabulary with the others removed."""
    logits = logits_of(6, 50, 40)
    ids = np.array([3, 4, 9, 17, 30, 39], dtype=np.int32)
    reduced = np.full_like(logits, -np.inf)
    reduced[:, ids] = logits[:, ids]
    picker = Picker(SamplingConfig(temperature=1.0, seed=1, noise="inverse-cdf"))
    whole = picker.pick(mx.array(reduced), mx.arange(50))
    assert mx.array_equal(
        picker.pick(mx.array(logits[:, ids]), mx.arange(50), token_ids=mx.array(ids)), whole
    )


def test_penalties_act_before_the_cdf() -> None:
    logits = mx.zeros((1, 8))
    picker = Picker(SamplingConfig(temperature=1.0, frequency_penalty=50.0, noise="inverse-cdf"))
    history = mx.array([[0, 1, 2, 3, 5, 6, 7]], dtype=mx.int32)
    assert {picker.pick(logits, mx.array([n]), history).item() for n in range(8)} == {4}


def test_greedy_ignores_the_noise_and_unknown_noise_is_refused() -> None:
    logits = mx.array(logits_of(7, 4))
    greedy = Picker(SamplingConfig(noise="inverse-cdf")).pick(logits, mx.arange(4))
    assert mx.array_equal(greedy, mx.argmax(logits, axis=-1))
    with pytest.raises(MTPError, match="noise is 'uniform'"):
        SamplingConfig(noise="uniform")  # type: ignore[arg-type]


def test_a_blurred_uniform_reaches_the_columns_around_it() -> None:
    """The mass of a Cauchy distribution in each column's stretch, in float64; none where a column has none."""
    rng = np.random.default_rng(4)
    scores = rng.normal(size=(30, 300)) * 3
    scores[:, ::7] = -np.inf
    uniforms = rng.random(30).astype(np.float32)
    mass = np.exp(scores) / np.exp(scores).sum(axis=1, keepdims=True)
    ends = np.cumsum(np.concatenate([np.zeros((30, 1)), mass], axis=1), axis=1)
    expected = np.diff(np.arctan((ends - uniforms[:, None]) / SPREAD), axis=1)
    found = np.array(blurred(mx.array(scores.astype(np.float32)), mx.array(uniforms)))
    np.testing.assert_allclose(found, expected, atol=2e-5)
    assert not found[:, ::7].any()
