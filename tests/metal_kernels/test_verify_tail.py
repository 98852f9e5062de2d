"""verify_tail against a float64 reference and the runtime's Picker, bit-equal noise, traffic, and planted faults."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mtp_mlx.decode.pick import Picker, SamplingConfig
from mtp_mlx.decode.tree import path_of, walk
from mtp_mlx.metal_kernels import verify_tail
from mtp_mlx.metal_kernels.launch import KernelText, Launch
from mtp_mlx.metal_kernels.position_noise import gumbel_of_keys, row_keys, uniform_bits
from tests.metal_kernels import emulated
from tests.metal_kernels.verify_calls import (
    DTYPES,
    LARGEST_UNIFORM,
    MODES,
    assert_picks_are_right,
    case,
    leading_run,
    neck_and_neck,
    outputs,
    picks_and_accepted,
)

# --- the noise, bit for bit ---------------------------------------------------------------------------------


def noise_probe(keys: mx.array, ids: mx.array) -> Launch:
    """The kernels' own noise function, written out: [R, N]."""
    body = """
  const uint row = thread_position_in_grid.y;
  const uint column = thread_position_in_grid.x;
  const uint bits = noise_bits(keys[2 * row], keys[2 * row + 1], ids[column]);
  noise[row * threads_per_grid.x + column] = gumbel_of_uniform(uniform_of_bits(bits));
"""
    text = KernelText("noise_probe", ("keys", "ids"), ("noise",), verify_tail.NOISE_HEADER, body)
    shape = (keys.shape[0], ids.size)
    grid, group = (shape[1], shape[0], 1), (128, 1, 1)
    return Launch(text, (keys, ids), (), grid, group, (shape,), (mx.float32,))


def assert_same_bits(kernel: mx.array, runtime: mx.array) -> None:
    np.testing.assert_array_equal(np.array(kernel).view(np.uint32), np.array(runtime).view(np.uint32))


@pytest.mark.parametrize("seed", [0, 1, 2**40 + 7, 2**64 - 1])
def test_the_noise_has_the_runtimes_bits(seed: int) -> None:
    """A million values in all; the compared paths are those of one device."""
    keys = row_keys(seed, mx.array([0, 1, 2, 77, 4095, 2**20, 2**31 - 1, 12_345_678]))
    first = int(np.random.default_rng(seed).integers(0, 120_000))
    ids = (mx.arange(32_000) + first).astype(mx.uint32)
    launch = noise_probe(keys, ids)
    assert_same_bits(emulated.run(launch)[0], gumbel_of_keys(keys, ids))


def id_with_bits(target: int) -> int:
    """The token id whose noise bits, under keys (0, 0), are `target`: the finaliser run backwards."""
    x = target ^ (target >> 16)
    x = x * pow(0x846CA68B, -1, 2**32) % 2**32
    x ^= (x >> 15) ^ (x >> 30)
    x = x * pow(0x7FEB352D, -1, 2**32) % 2**32
    return x ^ (x >> 16)


def test_the_noise_has_the_runtimes_bits_at_its_edges() -> None:
    """Smallest and largest uniforms, and those around which 1 - w rounds to another value."""
    edges = {0, 1, 2, 3, 2**32 - 129, 2**32 - 128, 2**32 - 1, 2**31 - 1, 2**31, 2**31 + 1}
    edges |= {2**power + offset for power in range(5, 32) for offset in (-1, 0, 1)}
    targets = sorted(edges)
    ids = mx.array(np.array([id_with_bits(target) for target in targets], dtype=np.uint32))
    keys = mx.zeros((4, 2), dtype=mx.uint32)
    assert np.array(uniform_bits(keys, ids))[0].tolist() == targets
    launch = noise_probe(keys, ids)
    factory = emulated.FACTORY
    noise = launch.run(factory)[0]
    assert_same_bits(noise, gumbel_of_keys(keys, ids))
    exact = -np.log(-np.log1p(-(np.array(targets) + 0.5) / 2**32))
    large = exact > 0
    np.testing.assert_allclose(np.array(noise)[0][large], exact[large], rtol=1e-6)


def test_skipped_noise_is_bounded_from_above() -> None:
    """`most_gumbel`, by which the kernel leaves noise out, is never below the noise."""
    body = """
  const float w = uniform_of_bits(bits[thread_position_in_grid.x]);
  slack[thread_position_in_grid.x] = most_gumbel(w) - gumbel_of_uniform(w);
"""
    text = KernelText("slack_probe", ("bits",), ("slack",), verify_tail.NOISE_HEADER, body)
    edges = np.array([2**32 - 1] + [2**power + offset for power in range(32) for offset in (-1, 0, 1)])
    random = np.random.default_rng(0).integers(0, 2**32, size=16_384 - len(edges))
    bits = mx.array(np.concatenate([edges, random]).astype(np.uint32))
    launch = Launch(text, (bits,), (), (bits.size, 1, 1), (256, 1, 1), (bits.shape,), (mx.float32,))
    factory = emulated.FACTORY
    slack = np.array(launch.run(factory)[0])
    assert slack.min() > 5e-4


# --- picks and acceptance -----------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n_rows", range(1, 18))
def test_every_row_count(mode: str, n_rows: int, dtype: mx.Dtype) -> None:
    """Rows 1 to 17 in every type, ragged vocabularies from one simdgroup to all, all acceptance lengths."""
    n_columns = (8, 31, 33, 127, 129, 1009, 4093, 4097, 5003)[n_rows % 9]
    arguments = case(mode, n_rows, n_columns, dtype, seed=n_rows, n_right=n_rows * 5 % (n_rows + 1))
    emulated.assert_text_is_mlx(verify_tail.launch(*arguments))
    picks, accepted = picks_and_accepted(arguments)
    assert_picks_are_right(arguments, picks)
    assert accepted == leading_run(picks, np.array(arguments[1]))
    assert accepted == min(n_rows * 5 % (n_rows + 1), n_rows - 1)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    ("n_rows", "n_columns", "dtype"), list(zip((2, 5, 3), (151_936, 49_152, 50_021), DTYPES))
)
def test_real_vocabularies(mode: str, n_rows: int, n_columns: int, dtype: mx.Dtype) -> None:
    arguments = case(mode, n_rows, n_columns, dtype, seed=n_columns)
    picks, accepted = picks_and_accepted(arguments)
    assert_picks_are_right(arguments, picks)
    assert accepted == leading_run(picks, np.array(arguments[1]))
    if mode != "inverse cdf":  # there a uniform may fall on a border of the reference's sums
        assert accepted == min(2, n_rows - 1)


def test_noise_that_just_wins_is_not_skipped() -> None:
    """The kernel leaves out noise that cannot win; here nearly all of it does, by less than 1e-3."""
    keys = row_keys(4, mx.arange(5))
    logits = mx.array(neck_and_neck(keys, 5003))
    arguments = (logits, mx.zeros((5,), dtype=mx.int32), 1.0, keys, ())
    picks, _ = picks_and_accepted(arguments)
    assert picks.min() > 4990
    np.testing.assert_array_equal(picks, np.array(verify_tail.reference(*arguments)[0]))


@pytest.mark.parametrize("temperature", [0.0, 1e-4, 0.3, 1.0, 1.7])
@pytest.mark.parametrize("dtype", DTYPES)
def test_picks_equal_the_pickers(temperature: float, dtype: mx.Dtype) -> None:
    """Random rows, rows full of ties, rows far from zero, rows with most tokens forbidden."""
    generator = np.random.default_rng(3)
    normal = generator.normal(size=(9, 2003)) * 4
    rows = np.concatenate(
        [normal, np.round(normal[:3]), normal[:3] + 3000, normal[:3] * 100, np.zeros((2, 2003))]
    )
    rows[4, 5:2000] = -np.inf
    logits = mx.array(rows.astype(np.float32)).astype(dtype)
    positions = mx.arange(len(rows)) * 91
    config = SamplingConfig(temperature=temperature, seed=2**33 + 5)
    expected = np.array(Picker(config).pick(logits, positions))
    tokens = mx.array(np.concatenate([[0], expected[:-1]]).astype(np.int32))
    keys = row_keys(config.seed, positions)
    picks, accepted = verify_tail.run(emulated.FACTORY, logits, tokens, temperature, keys)
    np.testing.assert_array_equal(np.array(picks), expected)
    assert accepted.tolist() == [len(rows) - 1]


@st.composite
def trees(draw: st.DrawFn) -> tuple[tuple[int, ...], list[bool]]:
    """(rows that the drafts follow, whether each draft is to be right); of siblings one at most is."""
    count = draw(st.integers(2, 20))
    parents = tuple(draw(st.integers(0, row)) for row in range(count))
    wanted = [draw(st.booleans()) for _ in parents]
    firsts = [parents.index(parent) == row for row, parent in enumerate(parents)]
    return parents, [right and first for right, first in zip(wanted, firsts, strict=True)]


@settings(max_examples=60, deadline=None)
@given(tree=trees(), mode=st.sampled_from(MODES), seed=st.integers(0, 2**20))
def test_trees_are_walked_as_by_mlx(tree: tuple[tuple[int, ...], list[bool]], mode: str, seed: int) -> None:
    """Rows off the path are those that a walk from the pending token does not come to, one draft at a time."""
    parents, right = tree
    n_rows = len(parents) + 1
    logits, _, temperature, noise, _ = case(mode, n_rows, 129, mx.float32, seed)
    picks = verify_tail.reference(logits, mx.zeros((n_rows,), dtype=mx.int32), temperature, noise)[0].tolist()
    tokens = [5]
    for row, (parent, is_right) in enumerate(zip(parents, right, strict=True), start=1):
        tokens.append(picks[parent] if is_right else (picks[parent] + 1 + row) % 129)
    arguments = (logits, mx.array(tokens, dtype=mx.int32), temperature, noise, parents)
    (result,) = outputs(verify_tail.launch(*arguments))
    assert result[:n_rows].tolist() == picks
    expected = [0]
    for parent, is_right in zip(parents, right, strict=True):
        expected.append(int(expected[parent] or not is_right))
    assert result[n_rows:].tolist() == expected
    assert verify_tail.reference(*arguments)[1].tolist() == expected
    nodes = tuple(parent - 1 for parent in parents)
    walked = walk(mx.array(picks), arguments[1][1:], nodes)
    from_kernel = path_of(mx.array(result[n_rows + 1 :]) == 0, nodes)
    for one, other in zip(walked, from_kernel, strict=True):
        assert one.tolist() == other.tolist()


ROW_WITH_TIES = [1.0, 7.0, -2.0, 7.0] * 100
SPECIAL_ROWS = {
    "ties": (ROW_WITH_TIES, 1),
    "all equal": ([-3.0] * 400, 0),
    "only the last is possible": ([-np.inf] * 399 + [-50.0], 399),
    "nothing is possible": ([-np.inf] * 400, 0),
    "negative and positive zero": ([-1.0] * 7 + [-0.0, 0.0] * 100 + [-1.0] * 193, 7),
    "infinity": ([1.0] * 300 + [np.inf, 2.0, np.inf] + [1.0] * 97, 300),
    "all negative": (list(-np.arange(400.0) - 1), 0),
    "the largest half values": ([-65504.0] * 200 + [65504.0] * 200, 200),
}


@pytest.mark.parametrize("name", SPECIAL_ROWS)
def test_special_rows_greedy(name: str) -> None:
    row, expected = SPECIAL_ROWS[name]
    logits = mx.array(np.array([row, row[::-1]], dtype=np.float32)).astype(mx.float16)
    tokens = mx.array([1, expected], dtype=mx.int32)
    picks, accepted = picks_and_accepted((logits, tokens, 0.0, None, ()))
    assert picks[0] == expected and accepted == 1
    assert picks.tolist() == np.argmax(np.array(logits.astype(mx.float32)), axis=-1).tolist()


@pytest.mark.parametrize("mode", MODES[:2])
@pytest.mark.parametrize("at", [0, 3, 130, 399])
def test_the_first_nan_is_picked_as_by_argmax(mode: str, at: int) -> None:
    rows = np.random.default_rng(at).normal(size=(2, 400)).astype(np.float32)
    rows[0, at:] = np.where(np.arange(at, 400) % 7 == at % 7, np.nan, rows[0, at:])
    logits, tokens = mx.array(rows), mx.array([0, at], dtype=mx.int32)
    temperature = 0.0 if mode == "greedy" else 1.0
    picks, accepted = picks_and_accepted((logits, tokens, temperature, row_keys(1, mx.arange(2)), ()))
    assert picks[0] == at == np.argmax(rows[0]) and accepted == 1


@pytest.mark.parametrize(
    ("row", "uniform", "expected"),
    [
        (ROW_WITH_TIES, 0.0, 0),
        ([-np.inf] * 3 + [0.0] * 397, 0.0, 3),
        ([0.0] * 400, 0.5, 200),
        ([0.0] * 400, 0.49999, 199),
        ([0.0] * 390 + [-np.inf] * 10, LARGEST_UNIFORM, 389),
        ([0.0] * 390 + [-200.0] * 10, 1.0, 389),  # out of range by rounding: the last column with mass
        ([-np.inf] * 400, 0.3, 0),
        ([np.nan] * 200 + [0.0] * 200, 0.25, 250),
        ([1.0] * 300 + [np.inf, 2.0, np.inf] + [1.0] * 97, 0.6, 302),
        ([0.0] * 100 + [-np.inf] * 200 + [0.0] * 100, 0.5, 300),
        (list(np.arange(400.0) * 5), 0.2, 399),
        (list(-np.arange(400.0) * 5), 0.2, 0),
    ],
)
def test_special_rows_inverse_cdf(row: list[float], uniform: float, expected: int) -> None:
    logits = mx.array(np.array([row, [0.0] * 400], dtype=np.float32))
    tokens = mx.array([0, expected], dtype=mx.int32)
    noise = mx.array([uniform, 0.9], dtype=mx.float32)
    arguments = (logits, tokens, 1.0, noise)
    picks, accepted = picks_and_accepted(arguments)
    assert picks.tolist() == [expected, 360] and accepted == 1
    assert np.array(verify_tail.reference(*arguments)[0]).tolist() == [expected, 360]


def test_inverse_cdf_has_the_softmax_as_its_marginal() -> None:
    """Evenly spaced uniforms: every token is picked as often as its probability says, to within two."""
    row = np.random.default_rng(8).normal(size=300) * 2
    n_rows = 64
    logits = mx.array(np.broadcast_to(row, (n_rows, 300)).astype(np.float32))
    noise = mx.array(((np.arange(n_rows) + 0.5) / n_rows).astype(np.float32))
    picks, _ = picks_and_accepted((logits, mx.zeros((n_rows,), dtype=mx.int32), 1.3, noise))
    probabilities = np.exp(row / 1.3) / np.exp(row / 1.3).sum()
    assert np.abs(np.bincount(picks, minlength=300) - probabilities * n_rows).max() <= 1.01
    assert (np.diff(picks) >= 0).all()


# --- text, traffic, self-check ------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES[:2])
@pytest.mark.parametrize("dtype", DTYPES)
def test_greedy_and_gumbel_read_every_logit_once(mode: str, dtype: mx.Dtype) -> None:
    arguments = case(mode, 6, 4999, dtype, seed=1)
    launch = verify_tail.launch(*arguments)
    emulated.run(launch)
    moved = emulated.traffic(launch)
    assert moved["read"]["logits"] == 6 * 4999 * dtype.size
    assert moved["read"]["tokens"] == 5 * 4
    assert moved["barriers"] == 6


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n_columns", [4999, 49_152])
def test_inverse_cdf_reads_one_range_twice(dtype: mx.Dtype, n_columns: int) -> None:
    """Each row: every logit once, 1/32 of them again, and the picked thread's stretch up to the pick."""
    arguments = case("inverse cdf", 4, n_columns, dtype, seed=n_columns)
    launch = verify_tail.launch(*arguments)
    picks = np.array(emulated.run(launch)[0])[:-1]
    n_range = -(-n_columns // 32)
    again = 0
    for pick in picks.tolist():
        start = pick // n_range * n_range
        length = min(n_range, n_columns - start)
        again += length + (pick - start) % -(-length // 1024) + 1
    moved = emulated.traffic(launch)
    assert moved["read"]["logits"] == (4 * n_columns + again) * dtype.size
    assert again <= 4 * (n_range + -(-n_range // 1024))
    assert moved["barriers"] == 3 * 4


@pytest.mark.parametrize("index", range(len(verify_tail.samples())))
def test_the_reference_agrees_on_the_samples(index: int) -> None:
    arguments = verify_tail.samples()[index]
    assert verify_tail.supported(*arguments)
    ours = verify_tail.run(emulated.FACTORY, *arguments)
    theirs = verify_tail.reference(*arguments)
    assert verify_tail.agrees(ours, theirs)
    assert not verify_tail.agrees((ours[0] + 1, ours[1]), theirs)
    assert not verify_tail.agrees((ours[0], ours[1] + 1), theirs)
    n_rows, n_columns = arguments[0].shape
    assert verify_tail.shape_key(*arguments).removesuffix(" tree").endswith(f" {n_rows}x{n_columns}")


# --- refusals -----------------------------------------------------------------------------------------------


WARM = 1.0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((mx.zeros((2, 3, 40)), mx.zeros((2,), dtype=mx.int32), WARM), r"\(2, 3, 40\)"),
        ((mx.zeros((2, 7)), mx.zeros((2,), dtype=mx.int32), 0.0), "8 columns"),
        ((mx.zeros((2, 40), dtype=mx.int32), mx.zeros((2,), dtype=mx.int32), 0.0), "int32"),
        ((mx.zeros((2, 40)), mx.zeros((3,), dtype=mx.int32), 0.0), r"\(3,\).*\(2,\)"),
        ((mx.zeros((2, 40)), mx.zeros((2,)), 0.0), "float32"),
        ((mx.zeros((2, 40)), mx.zeros((2,), dtype=mx.int32), WARM), "needs noise"),
        ((mx.zeros((2, 40)), mx.zeros((2,), dtype=mx.int32), WARM, mx.zeros((2,), dtype=mx.int32)), "int32"),
        ((mx.zeros((2, 40)), mx.zeros((2,), dtype=mx.int32), WARM, mx.zeros((3,))), r"\(3,\).*\(2,\)"),
        (
            (mx.zeros((2, 40)), mx.zeros((2,), dtype=mx.int32), WARM, mx.zeros((2,), dtype=mx.uint32)),
            r"\(2,\).*\(2, 2\)",
        ),
    ],
)
def test_calls_that_do_not_fit_are_refused(arguments: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        verify_tail.launch(*arguments)
