"""verify_tail against a float64 reference and the runtime's Picker, bit-equal noise, traffic, and planted faults."""

from __future__ import annotations

import dataclasses

import mlx.core as mx
import mslemu
import numpy as np
import pytest

from mtp_mlx.decode.noise import gumbel_of_keys, row_keys, uniform_bits
from mtp_mlx.decode.pick import Picker, SamplingConfig
from mtp_mlx.metal_kernels import verify_tail
from mtp_mlx.metal_kernels.launch import KernelText, Launch
from mtp_mlx.metal_kernels.verify_tail import CDF_ERROR
from tests.metal_kernels import emulated

DTYPES = (mx.float32, mx.float16, mx.bfloat16)
MODES = verify_tail.MODE_NAMES
TEMPERATURE = 0.7
SCORE_ERROR = 2e-5  # of logit / temperature + gumbel in float32, for scores up to 40 in size
LARGEST_UNIFORM = 1 - 2.0**-24


def outputs(launch: Launch) -> list[np.ndarray]:
    """The outputs, the same under three schedules, and on the GPU where there is one."""
    runs = [emulated.run(launch, schedule) for schedule in emulated.SCHEDULES]
    if mx.metal.is_available():
        runs.append(launch.run(mx.fast.metal_kernel))
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
    config, noise = SamplingConfig(), None
    if mode != "greedy":
        config = SamplingConfig(temperature=TEMPERATURE)
        noise = mx.array(generator.uniform(size=n_rows).astype(np.float32) * LARGEST_UNIFORM)
    if mode == "gumbel":
        noise = row_keys(seed, mx.arange(n_rows) + 100)
    picks, _ = verify_tail.reference(logits, mx.zeros((n_rows,), dtype=mx.int32), config, noise)
    tokens = np.concatenate([[5], np.array(picks)[:-1]]).astype(np.int32)
    tokens[1 + n_right :] = (tokens[1 + n_right :] + 1) % n_columns
    return logits, mx.array(tokens), config, noise


def assert_picks_are_right(arguments: verify_tail.Arguments, picks: np.ndarray) -> None:
    """Every pick is the float64 pick, or within the stated bound of being it."""
    logits, _, config, noise = arguments
    scores = double(logits) / (config.temperature or 1.0)
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
    if mx.metal.is_available():
        assert_same_bits(launch.run(mx.fast.metal_kernel)[0], gumbel_of_keys(keys, ids))
    else:
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
    factory = mx.fast.metal_kernel if mx.metal.is_available() else mslemu.metal_kernel
    noise = launch.run(factory)[0]
    assert_same_bits(noise, gumbel_of_keys(keys, ids))
    exact = -np.log(-np.log1p(-(np.array(targets) + 0.5) / 2**32))
    large = exact > 0
    np.testing.assert_allclose(np.array(noise)[0][large], exact[large], rtol=1e-6)


# --- picks and acceptance -----------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("n_rows", range(1, 18))
def test_every_row_count(mode: str, n_rows: int) -> None:
    """Rows 1 to 17, every type, ragged vocabularies from one simdgroup to all, all acceptance lengths."""
    dtype = DTYPES[(n_rows + MODES.index(mode)) % 3]
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
    if mx.metal.is_available():
        picks, accepted = verify_tail.run(mx.fast.metal_kernel, logits, tokens, config, keys)
    else:
        picks, accepted = verify_tail.run(mslemu.metal_kernel, logits, tokens, config, keys)
    np.testing.assert_array_equal(np.array(picks), expected)
    assert accepted.tolist() == [len(rows) - 1]


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
    picks, accepted = picks_and_accepted((logits, tokens, SamplingConfig(), None))
    assert picks[0] == expected and accepted == 1
    assert picks.tolist() == np.argmax(np.array(logits.astype(mx.float32)), axis=-1).tolist()


@pytest.mark.parametrize("mode", MODES[:2])
@pytest.mark.parametrize("at", [0, 3, 130, 399])
def test_the_first_nan_is_picked_as_by_argmax(mode: str, at: int) -> None:
    rows = np.random.default_rng(at).normal(size=(2, 400)).astype(np.float32)
    rows[0, at:] = np.where(np.arange(at, 400) % 7 == at % 7, np.nan, rows[0, at:])
    logits, tokens = mx.array(rows), mx.array([0, at], dtype=mx.int32)
    config = SamplingConfig(temperature=0.0 if mode == "greedy" else 1.0)
    picks, accepted = picks_and_accepted((logits, tokens, config, row_keys(1, mx.arange(2))))
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
    arguments = (logits, tokens, SamplingConfig(temperature=1.0), noise)
    picks, accepted = picks_and_accepted(arguments)
    assert picks.tolist() == [expected, 360] and accepted == 1
    assert np.array(verify_tail.reference(*arguments)[0]).tolist() == [expected, 360]


def test_inverse_cdf_has_the_softmax_as_its_marginal() -> None:
    """Evenly spaced uniforms: every token is picked as often as its probability says, to within two."""
    row = np.random.default_rng(8).normal(size=300) * 2
    n_rows = 64
    logits = mx.array(np.broadcast_to(row, (n_rows, 300)).astype(np.float32))
    noise = mx.array(((np.arange(n_rows) + 0.5) / n_rows).astype(np.float32))
    config = SamplingConfig(temperature=1.3)
    picks, _ = picks_and_accepted((logits, mx.zeros((n_rows,), dtype=mx.int32), config, noise))
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
    ours = verify_tail.run(mslemu.metal_kernel, *arguments)
    theirs = verify_tail.reference(*arguments)
    assert verify_tail.agrees(ours, theirs)
    assert not verify_tail.agrees((ours[0] + 1, ours[1]), theirs)
    assert not verify_tail.agrees((ours[0], ours[1] + 1), theirs)
    n_rows, n_columns = arguments[0].shape
    assert verify_tail.shape_key(*arguments).endswith(f" {n_rows}x{n_columns}")


# --- refusals -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"temperature": 0.5, "top_p": 0.9}, "top-p"),
        ({"temperature": 0.5, "min_p": 0.1}, "min-p"),
        ({"temperature": 0.5, "top_k": 3}, "top-k"),
        ({"repetition_penalty": 1.1}, "penalties"),
        ({"temperature": 0.5, "frequency_penalty": 0.2}, "penalties"),
    ],
)
def test_what_the_picker_must_do_is_refused(settings: dict[str, float], reason: str) -> None:
    logits, tokens = mx.zeros((2, 40)), mx.zeros((2,), dtype=mx.int32)
    config = SamplingConfig(**settings)  # type: ignore[arg-type]
    support = verify_tail.supported(logits, tokens, config, row_keys(0, mx.arange(2)))
    assert not support and reason in support.reason
    with pytest.raises(ValueError, match=reason):
        verify_tail.launch(logits, tokens, config, row_keys(0, mx.arange(2)))


def test_warps_that_drop_nothing_are_no_reason_to_refuse() -> None:
    config = SamplingConfig(temperature=0.5, top_k=40, min_p=0.5, min_tokens_to_keep=40)
    assert verify_tail.supported(mx.zeros((2, 40)), mx.zeros((2,), dtype=mx.int32), config)
    assert verify_tail.supported(mx.zeros((2, 40)), mx.zeros((2,)), SamplingConfig(top_p=0.5))


WARM = SamplingConfig(temperature=1.0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((mx.zeros((2, 3, 40)), mx.zeros((2,), dtype=mx.int32), WARM), r"\(2, 3, 40\)"),
        ((mx.zeros((2, 7)), mx.zeros((2,), dtype=mx.int32), SamplingConfig()), "8 columns"),
        ((mx.zeros((2, 40), dtype=mx.int32), mx.zeros((2,), dtype=mx.int32), SamplingConfig()), "int32"),
        ((mx.zeros((2, 40)), mx.zeros((3,), dtype=mx.int32), SamplingConfig()), r"\(3,\).*\(2,\)"),
        ((mx.zeros((2, 40)), mx.zeros((2,)), SamplingConfig()), "float32"),
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


# --- planted faults -----------------------------------------------------------------------------------------

BARRIER = "threadgroup_barrier(mem_flags::mem_threadgroup);"


def nth(old: str, new: str, index: int = 0):
    """Replaces one occurrence of `old`."""

    def edit(text: str) -> str:
        parts = text.split(old)
        if len(parts) <= index + 1:
            return text
        return old.join(parts[: index + 1]) + new + old.join(parts[index + 1 :])

    return edit


MUTANTS = {
    # greedy and Gumbel
    "dropped barrier": ("greedy", nth(BARRIER, "")),
    "wrong mem_flags": ("greedy", nth("mem_flags::mem_threadgroup", "mem_flags::mem_device")),
    "bound off by one": ("greedy", nth("column < columns ?", "column <= columns ?")),
    "unmasked tail": ("greedy", nth("column < columns ?", "true ?")),
    "dropped tail": ("greedy", nth("start < columns; start +=", "start + 4 * threads <= columns; start +=")),
    "stride too long": ("greedy", nth("start += 4 * threads", "start += 5 * threads")),
    "logits read twice": ("greedy", nth("start += 4 * threads", "start += 2 * threads")),
    "wrong row": ("greedy", nth("base = row * columns", "base = (row ^ 1) * columns")),
    "wrong identity of the lead": ("greedy", nth("group_lead[lane] : 0u", "group_lead[lane] : 0xffffffffu")),
    "wrong identity of the best": ("greedy", nth("float best = -INFINITY", "float best = 0.0f")),
    "unwritten slots": ("greedy", nth("lane < groups ? group_lead[lane] : 0u", "group_lead[lane]")),
    "highest column of a tie in a thread": ("greedy", nth("!(score <= best)", "!(score < best)")),
    "highest column of a tie in a group": ("greedy", nth("simd_min(lead == top", "simd_max(lead == top")),
    "highest column of a tie between groups": ("greedy", nth("simd_min(lead == top", "simd_max(lead == top", 1)),
    "negative scores in the wrong order": ("greedy", nth("? ~bits", "? bits")),
    "draft of the wrong row": ("greedy", nth("tokens[row + 1] != token", "tokens[row] != token")),
    "a draft behind the last row": ("greedy", nth("row + 1 < rows", "row < rows")),
    "last mismatch instead of first": ("greedy", nth("atomic_fetch_min", "atomic_fetch_max")),
    "accepted overwritten": ("greedy", nth("atomic_fetch_min_explicit", "atomic_store_explicit")),
    "every thread writes": ("inverse cdf", nth("== writer) {\n    const", "!= threads) {\n    const")),
    "keys of another row": ("gumbel", nth("noise[2 * row]", "noise[row]")),
    "keys swapped": ("gumbel", nth("noise_bits(key_0, key_1", "noise_bits(key_1, key_0")),
    "noise by thread, not by token": ("gumbel", nth("key_1, column", "key_1, thread_index")),
    "temperature forgotten": ("gumbel", nth("score[k] * scale", "score[k]")),
    "noise of the wrong sign": ("gumbel", nth("scaled + gumbel", "scaled - gumbel")),
    "noise that could win is skipped": ("gumbel", nth("0.001f -", "-1.0f -")),
    "noise is skipped though it would beat the best": ("gumbel", nth("< to_beat", "< to_beat + 3.0f")),
    # inverse CDF
    "dropped first barrier": ("inverse cdf", nth(BARRIER, "", 1)),
    "dropped second barrier": ("inverse cdf", nth(BARRIER, "", 2)),
    "dropped third barrier": ("inverse cdf", nth(BARRIER, "", 3)),
    "range off by one": ("inverse cdf", nth("min((group + 1) * range, columns)", "(group + 1) * range")),
    "running sum not rescaled": ("inverse cdf", nth("mass * mass_of(top, x, scale) + 1.0f", "mass + 1.0f")),
    "lanes not rescaled": ("inverse cdf", nth("simd_sum(mass * mass_of(top, simd_top, scale))", "simd_sum(mass)")),
    "ranges not rescaled": ("inverse cdf", nth("* mass_of(lane_top, row_top, scale)", "")),
    "total of the wrong lane": ("inverse cdf", nth("simd_shuffle(through, 31)", "simd_shuffle(through, 0)")),
    "goal not scaled": ("inverse cdf", nth("float(noise[row]) * total", "float(noise[row])")),
    "uniform of another row": ("inverse cdf", nth("noise[row]", "noise[0]")),
    "mass before the range forgotten": ("inverse cdf", nth("before_range + before_group", "before_group")),
    "mass before the group forgotten": ("inverse cdf", nth("before_range + before_group", "before_range")),
    "own group counted before itself": ("inverse cdf", nth("lane < group ?", "lane <= group ?")),
    "own mass counted before itself": ("inverse cdf", nth("(simd_through - mine)", "simd_through")),
    "group mass of the wrong lane": ("inverse cdf", nth("lane == 31", "lane == 30")),
    "stretch one short": ("inverse cdf", nth("+ threads - 1) / threads", ") / threads")),
    "walks to the end": ("inverse cdf", nth("if (sum > goal)", "if (false)")),
    "the whole row again": ("inverse cdf", nth("chosen_start = min(chosen * range, columns)", "chosen_start = 0u")),
}  # fmt: skip


FAULT_COLUMNS = (2503, 40_009)  # some simdgroups idle; several stretches of several columns


def fault_case(mode: str, n_columns: int) -> verify_tail.Arguments:
    """Six rows with ties and negative scores; the drafts of rows 1 and 3 are wrong."""
    logits, _, config, noise = case(mode, 6, n_columns, mx.float32, seed=5)
    rows = np.array(logits)
    if mode == "greedy":
        rows = np.round(rows * 4)
        rows[0, [2100, 1024, 1041, 1045, 1024 + 640]] = 60.0  # ties within a thread, a simdgroup, and between
        rows[2] -= 100.0
    elif mode == "gumbel":
        rows *= 0.3  # the noise decides
    else:
        rows *= np.linspace(0.2, 1.2, n_columns)  # the running maximum rises and the ranges differ
    logits = mx.array(rows.astype(np.float32))
    picks, _ = verify_tail.reference(logits, mx.zeros((6,), dtype=mx.int32), config, noise)
    tokens = np.concatenate([[3], np.array(picks)[:-1]]).astype(np.int32)
    tokens[[2, 4]] += 1
    return logits, mx.array(tokens), config, noise


def outcome(launch: Launch) -> list[tuple[list[int], int]]:
    """Result and bytes of logits read, under each schedule."""
    found = []
    for schedule in emulated.SCHEDULES:
        result = emulated.run(launch, schedule)[0].tolist()
        found.append((result, emulated.traffic(launch)["read"]["logits"]))
    return found


def is_seen(right: Launch, wrong: Launch) -> bool:
    """Whether the faulty launch breaks a rule of Metal, or moves or computes anything else."""
    try:
        return outcome(wrong) != outcome(right)
    except mslemu.KernelError:
        return True


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("n_columns", FAULT_COLUMNS)
def test_without_a_fault_the_case_is_right(mode: str, n_columns: int) -> None:
    arguments = fault_case(mode, n_columns)
    picks, accepted = picks_and_accepted(arguments)
    assert_picks_are_right(arguments, picks)
    assert accepted == leading_run(picks, np.array(arguments[1])) == 1


@pytest.mark.parametrize("name", MUTANTS)
def test_planted_faults_are_seen(name: str) -> None:
    mode, edit = MUTANTS[name]
    launches = [verify_tail.launch(*fault_case(mode, n_columns)) for n_columns in FAULT_COLUMNS]
    assert any(is_seen(launch, emulated.edited(launch, edit)) for launch in launches)


@pytest.mark.parametrize("init_value", [None, 0])
def test_a_missing_start_value_is_seen(init_value: float | None) -> None:
    launch = verify_tail.launch(*fault_case("greedy", FAULT_COLUMNS[0]))
    assert is_seen(launch, dataclasses.replace(launch, init_value=init_value))
