"""block_attention equals a float64 softmax over exactly the visible keys, and reads keys and values once per pass."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from mtp_mlx.metal_kernels import block_attention as attention
from mtp_mlx.metal_kernels.block_attention_shapes import MAX_CHUNKS, packed_limit
from tests.metal_kernels import emulated
from tests.metal_kernels.attention_calls import (
    BF16,
    BOUND,
    F16,
    F32,
    Case,
    answer,
    attend,
    call,
    distance,
    executions,
)

# Rows 1..17 and 32 in every type over one head size; then every head size with every type, over the edges of tiles,
# chunks and layouts.
ROWS = [Case(dtype, 64, 4, 2, rows, 61 + rows) for dtype in (F16, BF16, F32) for rows in (*range(1, 18), 32)]
SIZES = [
    Case(F32, 64, 3, 1, 2, 33, 32),
    Case(BF16, 64, 6, 3, 8, 127),
    Case(F32, 80, 2, 1, 7, 96, 64),
    Case(F16, 80, 9, 3, 5, 95, 32),
    Case(BF16, 80, 5, 5, 1, 31),
    Case(F32, 96, 4, 2, 9, 65),
    Case(F16, 96, 2, 1, 11, 161, 96),
    Case(BF16, 96, 7, 7, 3, 32),
    Case(F32, 128, 6, 2, 6, 100),
    Case(F16, 128, 12, 2, 4, 129, 64),
    Case(BF16, 128, 16, 2, 8, 130, 96),
    Case(F32, 256, 2, 1, 17, 70),
    Case(F16, 256, 4, 2, 10, 97, 64),
    Case(BF16, 256, 3, 1, 13, 99),
    Case(BF16, 64, 40, 1, 4, 40),
    Case(F16, 64, 2, 1, 31, 31),
]
# 8-bit caches: every type, group and head size they allow.
Q8 = [
    Case(F16, 64, 6, 2, 5, 97, 64, 64),
    Case(BF16, 96, 4, 2, 7, 65, None, 32),
    Case(F32, 128, 3, 1, 9, 70, None, 128),
    Case(BF16, 128, 8, 2, 4, 131, 96, 64),
    Case(F16, 256, 5, 1, 3, 50, 32, 64),
]


@pytest.mark.parametrize("case", ROWS + SIZES + Q8, ids=str)
def test_equals_float64_under_every_schedule(case: Case) -> None:
    arguments = call(case)
    wanted = answer(*arguments)
    for execute in executions():
        assert distance(attend(arguments, case.chunk, execute), wanted) <= BOUND[case.dtype]


@pytest.mark.parametrize("case", SIZES + Q8, ids=str)
def test_text_is_what_mlx_compiles(case: Case) -> None:
    partial = attention.launch_partial(*call(case), case.chunk)
    emulated.assert_text_is_mlx(partial)
    if partial.output_shapes[0][0] > 1:
        arrays = [
            mx.zeros(shape, dtype) for shape, dtype in zip(partial.output_shapes, partial.output_dtypes)
        ]
        emulated.assert_text_is_mlx(attention.launch_merge(*arrays, case.dtype))


@pytest.mark.parametrize("chunk", [None, 32])
def test_scores_far_below_zero_and_far_apart(chunk: int | None) -> None:
    case = Case(F32, 64, 4, 2, 5, 97)
    for chill in (150.0, -150.0):
        arguments = call(case, chill)
        # A score near 150 is known to 1.5e-5 in float32, and its weight to the same part of itself.
        assert distance(attend(arguments, chunk), answer(*arguments)) <= 5e-5


def test_block_rows_alone() -> None:
    """No prefix at all, and a chunk of which some rows see nothing."""
    arguments = call(Case(F16, 64, 2, 1, 32, 32))
    assert distance(attend(arguments), answer(*arguments)) <= BOUND[F16]
    queries, keys, values, _, length, scale = call(Case(F16, 64, 2, 1, 32, 48))
    alone = (queries, keys, values, attention.visibility_words(mx.eye(32) > 0), length, scale)
    assert distance(attend(alone, 32), answer(*alone)) <= BOUND[F16]


# head size, type, query heads, key heads, rows, times keys and values are read
TRAFFIC = [
    (64, F16, 8, 1, 8, 1),
    (128, F16, 32, 2, 4, 1),
    (128, BF16, 16, 2, 8, 1),
    (256, BF16, 4, 1, 8, 1),
    (64, F32, 8, 1, 4, 1),
    (64, F16, 13, 1, 5, 2),
    (128, F16, 9, 1, 15, 3),
]


@pytest.mark.parametrize("chunk", [None, 64])
@pytest.mark.parametrize("head_size,dtype,query_heads,key_heads,rows,passes", TRAFFIC)
def test_keys_and_values_are_read_once_up_to_the_limit(
    head_size: int,
    dtype: mx.Dtype,
    query_heads: int,
    key_heads: int,
    rows: int,
    passes: int,
    chunk: int | None,
) -> None:
    length = 75
    arguments = call(Case(dtype, head_size, query_heads, key_heads, rows, length))
    packed = query_heads // key_heads * rows
    assert -(-packed // packed_limit(head_size, dtype)) == passes
    launch = attention.launch_partial(*arguments, chunk)
    out, stats = emulated.run(launch)
    moved = emulated.traffic(launch)
    used = key_heads * length * head_size * dtype.size
    assert moved["read"]["keys"] == moved["read"]["values"] == passes * used
    assert moved["read"]["queries"] == out.shape[0] * arguments[0].nbytes
    assert moved["written"] == {"out": out.nbytes, "stats": stats.nbytes}
    if chunk is None:
        return
    merge = attention.launch_merge(out, stats, dtype)
    (merged,) = emulated.run(merge)
    moved = emulated.traffic(merge)
    assert moved["read"]["partial"] == out.nbytes and moved["read"]["stats"] == stats.nbytes
    assert moved["written"] == {"out": merged.nbytes}


@pytest.mark.parametrize("group", [32, 64, 128])
def test_words_of_an_8_bit_cache_are_read_once(group: int) -> None:
    """And each scale by the group / 16 neighbouring lanes that share it, in one load."""
    arguments = call(Case(BF16, 128, 8, 2, 5, 75, group=group))
    launch = attention.launch_partial(*arguments, 64)
    emulated.run(launch)
    read = emulated.traffic(launch)["read"]
    assert read["keys"] == read["values"] == 2 * 75 * 128
    for name in ("key_scales", "key_biases", "value_scales", "value_biases"):
        assert read[name] == 2 * 75 * (128 // group) * 2 * (group // 16)


def test_chunks_cost_at_most_an_eighth_of_the_keys() -> None:
    for key_heads, group, rows, length in (
        (2, 1, 1, 4096),
        (8, 4, 8, 32768),
        (1, 8, 8, 5000),
        (4, 5, 32, 9999),
    ):
        queries = mx.zeros((key_heads * group, rows, 64), F16)
        cache = mx.zeros((key_heads, length, 64), F16)
        scales = mx.zeros((key_heads, length, 1), F16)
        packed_cache = (mx.zeros((key_heads, length, 16), mx.uint32), scales, scales)
        for keys, itemsize in ((cache, 2), (packed_cache, 1)):
            launch = attention.launch_partial(queries, keys, keys, mx.zeros((rows,), mx.uint32), length, 1.0)
            chunks, chunk = launch.output_shapes[0][0], int(launch.inputs[-1][4].item())
            partial = 2 * 4 * group * rows * 64  # bytes written and read again, per chunk and key head
            assert 1 < chunks <= MAX_CHUNKS and chunk % 32 == 0
            assert partial <= 2 * chunk * 64 * itemsize / 8


def test_short_prefixes_take_one_launch() -> None:
    arguments = call(Case(F16, 64, 4, 2, 3, 256))
    assert attention.launch_partial(*arguments).output_shapes[0][0] == 1


def test_agrees_with_mlx_on_the_samples() -> None:
    for sample in attention.samples():
        ours, theirs = attention.run(emulated.FACTORY, *sample), attention.reference(*sample)
        assert ours.shape == theirs.shape and ours.dtype == theirs.dtype
        assert attention.agrees(ours, theirs)
        assert not attention.agrees(ours * 1.1, theirs)


def test_words_hold_the_visibility() -> None:
    seen = mx.array(np.random.default_rng(3).random((32, 32)) < 0.5)
    words = attention.visibility_words(seen)
    assert words.dtype == mx.uint32 and words.tolist()[0] == sum(
        1 << j for j in range(32) if seen[0, j].item()
    )
    assert mx.array_equal(attention.visibility_matrix(words), seen)
    for shape in ((3, 4), (33, 33), (4,)):
        with pytest.raises(ValueError, match=str(shape[0])):
            attention.visibility_words(mx.zeros(shape) > 0)


def test_what_is_not_supported_says_why() -> None:
    queries, keys, values, *rest = call(Case(F16, 64, 4, 2, 3, 40))
    assert attention.supported(queries, keys, values, *rest)
    assert "window" in attention.supported(queries, keys, values, *rest, window=128).reason
    assert "72" in attention.supported(mx.zeros((4, 3, 72), F16), keys, values, *rest).reason
    assert "shape" in attention.supported(queries, keys, values[:, :5], *rest).reason
    assert "float32" in attention.supported(queries, keys.astype(F32), values, *rest).reason
    assert "int32" in attention.supported(queries.astype(mx.int32), keys, values, *rest).reason
    for cache, reason in (
        (mx.quantize(values, bits=4), "4 bits"),
        (mx.quantize(values[:, :3], bits=8), "fewer than 8"),
        ((values, values), "words"),
        ((mx.zeros((2, 45, 16), mx.uint32), *2 * [mx.zeros((2, 45, 4), F16)]), "4 scales"),
    ):
        assert reason in attention.supported(queries, cache, cache, *rest).reason
    assert "33" in attention.supported(mx.zeros((4, 33, 64), F16), keys, values, *rest).reason


def test_shapes_that_do_not_fit_are_refused_with_both_numbers() -> None:
    queries, keys, values, visible, length, scale = call(Case(F16, 64, 4, 2, 3, 40))
    for change, numbers in (
        ({"length": 46}, ("46", "45")),
        ({"length": 2}, ("2", "3")),
        ({"queries": mx.zeros((5, 3, 64), F16)}, ("5", "2")),
        ({"queries": mx.zeros((4, 3, 128), F16)}, ("128", "64")),
        ({"visible": mx.zeros((4,), mx.uint32)}, ("3", "4")),
        ({"chunk": 48}, ("48", "32")),
    ):
        arguments = dict(
            queries=queries, keys=keys, values=values, visible=visible, length=length, scale=scale, chunk=None
        )
        with pytest.raises(ValueError) as error:
            attention.launch_partial(**{**arguments, **change})
        assert all(number in str(error.value) for number in numbers)
    with pytest.raises(ValueError, match="129"):
        attention.launch_merge(mx.zeros((129, 1, 1, 64)), mx.zeros((129, 1, 1, 2)), F16)


def test_shape_key_tells_classes_apart() -> None:
    first, second = call(Case(F16, 64, 4, 2, 3, 40)), call(Case(F16, 64, 4, 2, 3, 70))
    assert attention.shape_key(*first) == "float16 3 rows 4/2 heads x64 keys<2^6"
    assert attention.shape_key(*second) != attention.shape_key(*first)
