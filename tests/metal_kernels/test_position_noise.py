"""The noise generator against a second numpy implementation, published known answers, and chi-square tests.

Seeds are fixed, so a passing test stays a passing test; thresholds are at p = 1e-6 or so.
"""

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mtp_mlx.metal_kernels.position_noise import (
    gumbel,
    gumbel_of_bits,
    gumbel_of_keys,
    row_keys,
    uniform_bits,
)

MASK = 0xFFFFFFFF


def threefry2x32(key: tuple[int, int], counter: tuple[int, int]) -> tuple[int, int]:
    """Threefry-2x32-20 on Python integers, written from the paper's key schedule."""

    def rotated(word: int, by: int) -> int:
        return ((word << by) | (word >> (32 - by))) & MASK

    schedule = [key[0], key[1], 0x1BD11BDA ^ key[0] ^ key[1]]
    left, right = (counter[0] + schedule[0]) & MASK, (counter[1] + schedule[1]) & MASK
    for group, rotations in enumerate([(13, 15, 26, 6), (17, 29, 16, 24)] * 2 + [(13, 15, 26, 6)], start=1):
        for by in rotations:
            left = (left + right) & MASK
            right = rotated(right, by) ^ left
        left = (left + schedule[group % 3]) & MASK
        right = (right + schedule[(group + 1) % 3] + group) & MASK
    return left, right


def numpy_bits(seed: int, positions: np.ndarray, token_ids: np.ndarray) -> np.ndarray:
    """[R, N] uint32 in 64-bit arithmetic with explicit masks."""
    keys = np.array(
        [threefry2x32((seed % 2**32, seed // 2**32), (int(n), 0)) for n in positions], dtype=np.uint64
    )
    x = token_ids.astype(np.uint64)[None, :] ^ keys[:, :1]
    x = ((x ^ (x >> np.uint64(16))) * np.uint64(0x7FEB352D)) & np.uint64(MASK)
    x = x ^ keys[:, 1:]
    x = ((x ^ (x >> np.uint64(15))) * np.uint64(0x846CA68B)) & np.uint64(MASK)
    return (x ^ (x >> np.uint64(16))).astype(np.uint32)


def bits(seed: int, positions: np.ndarray, token_ids: np.ndarray) -> np.ndarray:
    return np.array(uniform_bits(row_keys(seed, mx.array(positions)), mx.array(token_ids)))


def chi_square_limit(cells: int) -> float:
    """Five standard deviations above the mean of chi-square with cells - 1 degrees of freedom."""
    return (cells - 1) + 5 * np.sqrt(2 * (cells - 1))


@pytest.mark.parametrize(
    ("key", "counter", "answer"),
    [
        ((0, 0), (0, 0), (0x6B200159, 0x99BA4EFE)),
        ((MASK, MASK), (MASK, MASK), (0x1CB996FC, 0xBB002BE7)),
        ((0x13198A2E, 0x03707344), (0x243F6A88, 0x85A308D3), (0xC4923A9C, 0x483DF7A0)),
    ],
)
def test_the_test_threefry_gives_random123_known_answers(key, counter, answer) -> None:
    assert threefry2x32(key, counter) == answer


def test_row_keys_give_the_first_known_answer() -> None:
    assert np.array(row_keys(0, mx.array([0]))).tolist() == [[0x6B200159, 0x99BA4EFE]]


@settings(deadline=None, max_examples=50)
@given(
    seed=st.integers(0, 2**64 - 1),
    positions=st.lists(st.integers(0, 2**31 - 1), min_size=1, max_size=4),
    token_ids=st.lists(st.integers(0, 300_000), min_size=1, max_size=9),
)
def test_bits_equal_the_numpy_implementation(seed: int, positions: list[int], token_ids: list[int]) -> None:
    rows, columns = np.array(positions, dtype=np.int32), np.array(token_ids, dtype=np.int32)
    np.testing.assert_array_equal(bits(seed, rows, columns), numpy_bits(seed, rows, columns))


def test_gumbel_matches_float64_and_is_finite_at_both_ends() -> None:
    rows, columns = np.arange(8, dtype=np.int32), np.arange(50_021, dtype=np.int32)
    uniform = (numpy_bits(3, rows, columns).astype(np.float64) + 0.5) / 2**32
    expected = -np.log(-np.log1p(-uniform))
    actual = np.array(gumbel(3, mx.array(rows), mx.array(columns)))
    assert actual.dtype == np.float32 and np.isfinite(actual).all()
    inner = uniform < 1 - 1e-4  # near 1 float32 is coarse; those are the smallest Gumbels, which never win
    np.testing.assert_allclose(actual[inner], expected[inner], rtol=1e-5, atol=2e-4)
    large = expected > 5
    np.testing.assert_allclose(actual[large], expected[large], rtol=1e-6)


def test_the_extreme_bits_stay_finite() -> None:
    extremes = mx.array([[0, 1, 2**32 - 129, 2**32 - 128, 2**32 - 1]], dtype=mx.uint32)
    values = np.array(gumbel_of_bits(extremes))
    assert np.isfinite(values).all()
    assert values[0, 0] == pytest.approx(33 * np.log(2), rel=1e-6)
    assert values[0, -1] == pytest.approx(-np.log(24 * np.log(2)), rel=1e-5)


def test_the_written_out_logarithm_keeps_the_precision_of_small_uniforms() -> None:
    """Around the powers of two, where 1 - w rounds to another value, against float64 log1p."""
    edges = sorted({2**power + offset for power in range(32) for offset in (-1, 0, 1)} - {0})
    edges = [edge for edge in edges if edge <= 2**31]
    exact = -np.log(-np.log1p(-(np.array(edges) + 0.5) / 2**32))
    np.testing.assert_allclose(np.array(gumbel_of_bits(mx.array(edges, dtype=mx.uint32))), exact, rtol=1e-6)


def test_compiled_noise_has_the_bits_of_the_steps_one_by_one() -> None:
    """What kernels reproduce: every operation rounded once, nothing fused or reordered by the compiler."""
    keys, ids = row_keys(5, mx.arange(40)), mx.arange(10_007)
    bits = uniform_bits(keys, ids)
    mx.eval(bits)
    shifted = bits.astype(mx.float32) + 0.5
    mx.eval(shifted)
    uniform = mx.minimum(shifted * 2.0**-32, 1 - 2.0**-24)
    mx.eval(uniform)
    rest = 1.0 - uniform
    mx.eval(rest)
    ratio, logarithm = uniform / (1.0 - rest), -mx.log(rest)
    mx.eval(ratio, logarithm)
    exponential = mx.where(rest == 1.0, uniform, logarithm * ratio)
    mx.eval(exponential)
    expected = np.array(-mx.log(exponential)).view(np.uint32)
    np.testing.assert_array_equal(np.array(gumbel_of_keys(keys, ids)).view(np.uint32), expected)


def test_noise_does_not_depend_on_the_block_or_the_vocabulary() -> None:
    rows, columns = mx.arange(7), mx.arange(1003)
    whole = np.array(gumbel(11, rows, columns))
    for row in range(7):
        np.testing.assert_array_equal(
            np.array(gumbel(11, rows[row : row + 1], columns)), whole[row : row + 1]
        )
    subset = mx.array([1002, 5, 77])
    np.testing.assert_array_equal(np.array(gumbel(11, rows, subset)), whole[:, [1002, 5, 77]])


def draws() -> np.ndarray:
    """[200, 5000] bits: 200 adjacent positions, 5000 adjacent ids."""
    return bits(20250717, np.arange(200, dtype=np.int32), np.arange(5000, dtype=np.int32))


@pytest.mark.parametrize("shift", [0, 8, 16, 24])
def test_every_byte_is_uniform(shift: int) -> None:
    counts = np.bincount(((draws() >> shift) & 255).ravel(), minlength=256)
    expected = counts.sum() / 256
    assert ((counts - expected) ** 2 / expected).sum() < chi_square_limit(256)


@pytest.mark.parametrize(
    ("row_step", "column_step"), [(0, 1), (0, 2), (0, 256), (1, 0), (2, 0), (1, 1), (1, -1)]
)
@pytest.mark.parametrize("shift", [28, 16, 0])
def test_neighbours_are_independent(row_step: int, column_step: int, shift: int) -> None:
    nibbles = (draws() >> shift) & 15
    shifted = np.roll(nibbles, (-row_step, -column_step), axis=(0, 1))
    counts = np.bincount((nibbles * 16 + shifted).ravel(), minlength=256)
    expected = counts.sum() / 256
    assert ((counts - expected) ** 2 / expected).sum() < chi_square_limit(256)


def test_adjacent_seeds_and_positions_flip_half_of_the_bits() -> None:
    columns = np.arange(2000, dtype=np.int32)
    base = bits(6, np.array([40]), columns)
    for seed, position in [(7, 40), (6, 41), (6 + 2**32, 40), (6 + 2**63, 40)]:
        flipped = np.unpackbits((base ^ bits(seed, np.array([position]), columns)).view(np.uint8)).mean()
        assert abs(flipped - 0.5) < 5 * 0.5 / np.sqrt(2000 * 32)


def test_the_tail_has_the_right_mass() -> None:
    values = np.array(gumbel(1, mx.arange(200), mx.arange(5000)))
    for level in (3.0, 5.0, 8.0):
        probability = -np.expm1(-np.exp(-level))
        expected = probability * values.size
        assert abs((values > level).sum() - expected) < 5 * np.sqrt(expected)
