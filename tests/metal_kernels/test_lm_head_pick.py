"""lm_head_pick against a float64 reference: picks, probabilities, weights read once, and planted faults."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from mtp_mlx.decode.pick import Picker, SamplingConfig
from mtp_mlx.metal_kernels import lm_head_pick
from tests.metal_kernels import emulated
from tests.metal_kernels.head_calls import DTYPES, KINDS, assert_right, case, outputs

# --- results ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n_rows", range(1, 17))
def test_every_row_count(n_rows: int, dtype: mx.Dtype) -> None:
    """In every type; every width and group; on and off tiles; greedy and noisy, whole and reduced vocabularies."""
    kind = KINDS[n_rows % 7]
    size = (32, 96, 160, 544, 672)[n_rows % 5] if kind[0] <= 32 else (128, 384, 640)[n_rows % 3]
    n_columns = (8, 15, 17, 257, 1009, 531)[n_rows % 6]
    temperature = 0.8 if n_rows % 4 < 2 else 0.0
    arguments = case(n_rows, n_columns, size, dtype, kind, temperature, n_rows % 2 == 0, n_rows)
    parts = lm_head_pick.launch_parts(*arguments)
    emulated.assert_text_is_mlx(parts)
    merge = lm_head_pick.launch_merge(*emulated.run(parts), n_columns, arguments[8])
    emulated.assert_text_is_mlx(merge)
    assert_right(arguments, *outputs(arguments))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_every_type_and_width(dtype: mx.Dtype, kind: tuple[int, int]) -> None:
    arguments = case(2, 61, 384, dtype, kind, 1.3, seed=5)
    emulated.assert_text_is_mlx(lm_head_pick.launch_parts(*arguments))
    assert_right(arguments, *outputs(arguments, emulated.SCHEDULES[2:]))


@pytest.mark.parametrize(
    ("n_rows", "n_columns", "size", "dtype", "kind"),
    [
        (2, 151_936, 32, mx.float16, (32, 4)),
        (3, 49_152, 64, mx.bfloat16, (0, 0)),
        (1, 50_021, 32, mx.float32, (32, 8)),
    ],
)
def test_real_vocabularies(
    n_rows: int, n_columns: int, size: int, dtype: mx.Dtype, kind: tuple[int, int]
) -> None:
    """Several tiles per threadgroup, several parts per thread of the second launch."""
    arguments = case(n_rows, n_columns, size, dtype, kind, 0.6, seed=n_columns)
    assert_right(arguments, *outputs(arguments, emulated.SCHEDULES[2:]))


@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_picks_and_probabilities_are_the_pickers(temperature: float) -> None:
    """Float32, so that the logits that Picker sees are not rounded to a smaller type."""
    arguments = case(6, 523, 96, mx.float32, (0, 0), temperature, reduced=True, seed=21)
    hidden, weight, *_, ids = arguments
    expected = Picker(SamplingConfig(temperature=temperature, seed=21)).pick_with_confidence(
        hidden @ weight.T, mx.arange(6) + 9, None, ids
    )
    picks, confidence = outputs(arguments)
    np.testing.assert_array_equal(picks, np.array(expected[0]))
    np.testing.assert_allclose(confidence, np.array(expected[1]), rtol=1e-4)


@pytest.mark.parametrize("kind", [(0, 0), (32, 4)])
def test_a_row_does_not_depend_on_the_others(kind: tuple[int, int]) -> None:
    arguments = case(16, 203, 288, mx.float16, kind, 0.9, seed=3)
    hidden, *weights, temperature, keys, ids = arguments
    assert keys is not None
    together = outputs(arguments, emulated.SCHEDULES[2:])
    for start, stop in ((0, 1), (1, 3), (3, 7), (7, 15), (4, 16)):
        some = slice(start, stop)
        alone = outputs((hidden[some], *weights, temperature, keys[some], ids), emulated.SCHEDULES[2:])
        np.testing.assert_array_equal(alone[0], together[0][some])
        np.testing.assert_array_equal(alone[1], together[1][some])


@pytest.mark.parametrize("columns", [(3, 5), (3, 16), (200, 900), (15, 16), (2, 900)])
def test_equal_scores_pick_the_lowest_column(columns: tuple[int, int]) -> None:
    hidden, weight, *rest = case(2, 1009, 64, mx.float32, (0, 0), seed=1)
    weight[mx.array(columns)] = hidden[:1] * 2
    picks, _ = outputs((hidden, weight, *rest))
    assert picks[0] == columns[0]


def test_a_row_of_nan_leaves_the_others_alone() -> None:
    arguments = case(3, 77, 64, mx.float32, (0, 0), seed=2)
    right = outputs(arguments)
    hidden = np.array(arguments[0])
    hidden[1, 5] = np.nan
    picks, confidence = outputs((mx.array(hidden), *arguments[1:]))
    assert picks.tolist() == [right[0][0], 0, right[0][2]]
    assert np.isnan(confidence[1])
    np.testing.assert_array_equal(confidence[[0, 2]], right[1][[0, 2]])


# --- traffic, self-check ------------------------------------------------------------------------------------


@pytest.mark.parametrize("n_rows", [1, 2, 3, 4, 7, 8, 11, 16])
@pytest.mark.parametrize("kind", [(0, 0), (64, 4), (32, 8)])
def test_weights_are_read_once(n_rows: int, kind: tuple[int, int]) -> None:
    arguments = case(n_rows, 211, 320, mx.float16, kind, 0.5, seed=1)
    launch = lm_head_pick.launch_parts(*arguments)
    values, columns = emulated.run(launch)
    moved = emulated.traffic(launch)
    _, weight, scales, biases, *_ = arguments
    assert moved["read"]["weight"] == weight.nbytes
    if scales is not None and biases is not None:
        assert moved["read"]["scales"] == scales.nbytes
        assert moved["read"]["biases"] == biases.nbytes
    parts = -(-211 // 16)
    assert moved["written"]["part_values"] == values.nbytes == 4 * n_rows * parts * 4
    assert moved["written"]["part_columns"] == columns.nbytes
    assert moved["threadgroup_bytes"] <= 16 * 1024
    merge = lm_head_pick.launch_merge(values, columns, 211)
    emulated.run(merge)
    moved = emulated.traffic(merge)
    assert moved["read"]["part_values"] == values.nbytes
    assert moved["read"]["part_columns"] == columns.nbytes


@pytest.mark.parametrize("index", range(len(lm_head_pick.samples())))
def test_the_reference_agrees_on_the_samples(index: int) -> None:
    arguments = lm_head_pick.samples()[index]
    assert lm_head_pick.supported(*arguments)
    ours = lm_head_pick.run(emulated.FACTORY, *arguments)
    theirs = lm_head_pick.reference(*arguments)
    assert lm_head_pick.agrees(ours, theirs)
    assert not lm_head_pick.agrees((ours[0] + 1, ours[1]), theirs)
    assert not lm_head_pick.agrees((ours[0], ours[1] * 1.1), theirs)
    assert_right(arguments, np.array(ours[0]), np.array(ours[1]))
    shape = f"{arguments[0].shape[0]}x{arguments[1].shape[0]}x{arguments[0].shape[1]}"
    assert lm_head_pick.shape_key(*arguments).endswith(shape)


# --- refusals -----------------------------------------------------------------------------------------------


def changed(kind: tuple[int, int] = (32, 4), **changes: object) -> tuple:
    """Arguments that fit, with some replaced."""
    names = "hidden weight scales biases group_size bits temperature keys token_ids".split()
    values = dict(zip(names, case(2, 40, 64, mx.float16, kind, 0.5, True), strict=True))
    return tuple({**values, **changes}.values())


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (changed(hidden=mx.zeros((1, 2, 64))), "3 and 2 dimensions"),
        (changed(hidden=mx.zeros((2, 64), dtype=mx.int32)), "int32"),
        (changed(hidden=mx.zeros((17, 64))), "17 rows"),
        (changed(hidden=mx.zeros((2, 48))), "48 values"),
        (changed(weight=mx.zeros((7, 8), dtype=mx.uint32)), "7 columns"),
        (changed(keys=None), "missing"),
        (changed(keys=mx.zeros((3, 2), dtype=mx.uint32)), r"\(3, 2\).*\(2, 2\)"),
        (changed(token_ids=mx.zeros((39,), dtype=mx.int32)), r"\(39,\).*\(40,\)"),
        (changed(biases=None), "no biases"),
        (changed(bits=5), "5 bits"),
        (changed(group_size=16), "groups of 16"),
        (changed(group_size=128), "groups of 128"),
        (changed(weight=mx.zeros((40, 9), dtype=mx.uint32)), r"\(40, 9\).*\(40, 8\)"),
        (changed(scales=mx.zeros((40, 2))), "float32.*float16"),
        (changed(biases=mx.zeros((40, 3), dtype=mx.float16)), r"\(40, 3\).*\(40, 2\)"),
        (changed((0, 0), weight=mx.zeros((40, 64))), "float32.*float16"),
        (changed((0, 0), weight=mx.zeros((40, 96), dtype=mx.float16)), r"\(40, 96\).*\(40, 64\)"),
    ],
)
def test_calls_that_do_not_fit_are_refused(arguments: tuple, reason: str) -> None:
    support = lm_head_pick.supported(*arguments)
    assert not support
    for function in (lm_head_pick.launch_parts, lm_head_pick.reference):
        with pytest.raises(ValueError, match=reason):
            function(*arguments)


def test_parts_that_do_not_belong_together_are_refused() -> None:
    with pytest.raises(ValueError, match=r"\(4, 2, 5\).*\(2, 6\)"):
        lm_head_pick.launch_merge(mx.zeros((4, 2, 5)), mx.zeros((2, 6), dtype=mx.int32), 40)
