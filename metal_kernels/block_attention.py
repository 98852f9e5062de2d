"""Attention of the few rows of a block over a long KV cache; the kernel applies the block's visibility itself.

Contract: batch size 1; R = 1..32 query rows; the last R of the cache's `length` keys are the block's own rows. Row
r sees every key before those, and the block rows whose bit is set in `visible[r]`; a row always sees itself. There
is no mask array. The caches are the whole allocated buffers (mlx-lm allocates more than is in use, and a slice
would be copied), either plain or in mlx-lm's 8-bit layout (`QuantizedKVCache`: packed words, scales, biases).

The g = Hq / Hkv query heads of a key head are packed with the R rows: a threadgroup handles up to `packed_limit` of
these g * R rows and reads each key and value once for all of them. Beyond the limit, the rows are split into
ceil(g * R / limit) parts, and keys and values are read once per part. The softmax is in float32.

Long prefixes take two launches: `launch_partial` splits the keys into chunks, `launch_merge` combines them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import mlx.core as mx
from mlx_lm.models.base import quantized_scaled_dot_product_attention

from mtp_mlx.metal_kernels.block_attention_shapes import (
    HEAD_SIZES,
    MAX_CHUNKS,
    MAX_ROWS,
    TILE,
    chunk_keys,
    tiling,
)
from mtp_mlx.metal_kernels.launch import SMALL_INPUT, Factory, Launch, Support, TemplateValue, read_kernel

Cache = mx.array | Sequence[mx.array]  # [Hkv, capacity, D], or its words, scales and biases

PLAIN = read_kernel(
    "block_attention", ("queries", "keys", "values", "visible", "scale", "numbers"), ("out", "stats")
)
_Q8_INPUTS = (
    *("queries", "keys", "key_scales", "key_biases", "values", "value_scales", "value_biases"),
    *("visible", "scale", "numbers"),
)
_Q8 = read_kernel("block_attention_q8", _Q8_INPUTS, ("out", "stats"))
Q8 = replace(_Q8, header=PLAIN.header + _Q8.header)
MERGE = read_kernel("block_attention_merge", ("partial", "stats", "numbers"), ("out",))

DTYPES = (mx.float32, mx.float16, mx.bfloat16)
GROUP_SIZES = (32, 64, 128)


def visibility_words(visibility: mx.array) -> mx.array:
    """Pack the visibility among a block's rows into one word per row.

    Args:
        visibility: [R, R] bool, R <= 32; `visibility[i, j]` if row i sees row j.

    Returns:
        [R] uint32; bit j of row i is `visibility[i, j]`.

    Raises:
        ValueError: if it is not square or has more than 32 rows.
    """
    if visibility.ndim != 2 or visibility.shape[0] != visibility.shape[1]:
        raise ValueError(f"visibility must be square, got {visibility.shape}")
    if visibility.shape[0] > MAX_ROWS:
        raise ValueError(f"visibility must have at most {MAX_ROWS} rows, got {visibility.shape[0]}")
    bits = mx.left_shift(mx.array(1, mx.uint32), mx.arange(visibility.shape[0], dtype=mx.uint32))
    return mx.sum(visibility.astype(mx.uint32) * bits, axis=1).astype(mx.uint32)


def visibility_matrix(visible: mx.array) -> mx.array:
    """The inverse of `visibility_words`: [R] uint32 -> [R, R] bool."""
    places = mx.arange(visible.shape[0], dtype=mx.uint32)
    return mx.bitwise_and(mx.right_shift(visible[:, None], places[None]), mx.array(1, mx.uint32)) != 0


def _arrays(cache: Cache) -> tuple[mx.array, ...]:
    """The buffers of a cache: one array, or words, scales and biases."""
    return (cache,) if isinstance(cache, mx.array) else tuple(cache)


def _unsupported_cache(cache: Cache, head_size: int, dtype: mx.Dtype) -> str:
    """Why a cache of this layout cannot be read; "" if it can."""
    buffers = _arrays(cache)
    if buffers[-1].dtype != dtype:
        return f"queries are {dtype}, the cache {buffers[-1].dtype}"
    if len(buffers) == 1:
        return ""
    if len(buffers) != 3 or buffers[0].dtype != mx.uint32:
        return "a quantised cache must have words, scales and biases"
    if 4 * buffers[0].shape[-1] != head_size:
        return f"a cache of {32 * buffers[0].shape[-1] // head_size} bits; only 8 are supported"
    if head_size % buffers[1].shape[-1] or head_size // buffers[1].shape[-1] not in GROUP_SIZES:
        return f"{buffers[1].shape[-1]} scales for a head size of {head_size}"
    if buffers[1].size < SMALL_INPUT:
        return f"a cache of {buffers[1].size} scales, fewer than {SMALL_INPUT}"
    return ""


def supported(
    queries: mx.array,
    keys: Cache,
    values: Cache,
    visible: mx.array,
    length: int,
    scale: float,
    window: int | None = None,
) -> Support:
    """Whether the kernel supports this call, by shapes and dtypes. Arguments as in `run`; window: sliding window."""
    head_size, dtype = queries.shape[-1], queries.dtype
    if window is not None:
        return Support(False, "sliding windows are not supported")
    if head_size not in HEAD_SIZES:
        return Support(False, f"head size {head_size} is not one of {', '.join(map(str, HEAD_SIZES))}")
    if dtype not in DTYPES:
        return Support(False, f"queries are {dtype}")
    if [a.shape for a in _arrays(keys)] != [a.shape for a in _arrays(values)]:
        return Support(False, "keys and values differ in shape")
    if queries.shape[-2] > MAX_ROWS:
        return Support(False, f"{queries.shape[-2]} rows are more than {MAX_ROWS}")
    reason = _unsupported_cache(keys, head_size, dtype) or _unsupported_cache(values, head_size, dtype)
    return Support(not reason, reason)


def _check(queries: mx.array, keys: Cache, values: Cache, visible: mx.array, length: int) -> None:
    """Raise ValueError, with both numbers, for anything `launch_partial` does not support."""
    buffers = _arrays(keys)
    if queries.ndim != 3 or any(a.ndim != 3 for a in (*buffers, *_arrays(values))):
        raise ValueError(
            f"queries and caches must have three dimensions, got {queries.ndim} and {buffers[0].ndim}"
        )
    support = supported(queries, keys, values, visible, length, 1.0)
    if not support:
        raise ValueError(support.reason)
    (query_heads, rows, head_size), (key_heads, capacity, width) = queries.shape, buffers[0].shape
    if len(buffers) == 1 and width != head_size:
        raise ValueError(f"queries have head size {head_size}, keys {width}")
    if any(a.shape[:2] != (key_heads, capacity) for a in buffers):
        raise ValueError(f"words, scales and biases have different rows: {[a.shape[:2] for a in buffers]}")
    if query_heads % key_heads:
        raise ValueError(f"{query_heads} query heads are not a multiple of {key_heads} key heads")
    if not rows <= length <= capacity:
        raise ValueError(f"length {length} must be between {rows} rows and {capacity} allocated keys")
    if visible.shape != (rows,) or visible.dtype != mx.uint32:
        raise ValueError(f"visible must be [{rows}] uint32, got {visible.shape} {visible.dtype}")


def launch_partial(
    queries: mx.array,
    keys: Cache,
    values: Cache,
    visible: mx.array,
    length: int,
    scale: float,
    chunk: int | None = None,
) -> Launch:
    """The pass over the keys, with outputs [chunks, Hq, R, D] (float32, or the final type for a single chunk) and
    [chunks, Hq, R, 2] float32. Arguments as in `run`.

    Raises:
        ValueError: if shapes or types do not match, or the chunk is not a multiple of 32 or gives over 128 chunks.
    """
    _check(queries, keys, values, visible, length)
    buffers = _arrays(keys)
    (query_heads, rows, head_size), (key_heads, capacity, _) = queries.shape, buffers[0].shape
    packed = query_heads // key_heads * rows
    groups, packed_rows, parts = tiling(packed, head_size, queries.dtype)
    if chunk is None:
        itemsize = queries.dtype.size if len(buffers) == 1 else 1
        chunk = chunk_keys(length, key_heads, packed, parts, itemsize)
    if chunk < TILE or chunk % TILE:
        raise ValueError(f"a chunk of {chunk} keys is not a multiple of {TILE}")
    chunks = -(-length // chunk)
    if chunks > MAX_CHUNKS:
        raise ValueError(f"{chunks} chunks are more than {MAX_CHUNKS}")
    out_dtype = queries.dtype if chunks == 1 else mx.float32
    template: list[tuple[str, TemplateValue]] = [("T", queries.dtype), ("O", out_dtype), ("D", head_size)]
    template += [("ROWS", packed_rows), ("GROUPS", groups)]
    if len(buffers) == 3:
        template.append(("G", head_size // buffers[1].shape[-1]))
    numbers = mx.array([rows, packed, length, capacity, chunk], dtype=mx.int32)
    slope = mx.array([scale], dtype=mx.float32)
    return Launch(
        PLAIN if len(buffers) == 1 else Q8,
        (queries, *buffers, *_arrays(values), visible, slope, numbers),
        tuple(template),
        (32 * groups * chunks, key_heads, parts),
        (32 * groups, 1, 1),
        ((chunks, query_heads, rows, head_size), (chunks, query_heads, rows, 2)),
        (out_dtype, mx.float32),
    )


def launch_merge(partial: mx.array, stats: mx.array, dtype: mx.Dtype) -> Launch:
    """The pass that combines chunks: [chunks, Hq, R, D] and [chunks, Hq, R, 2] float32 -> [Hq, R, D] of `dtype`.

    Raises:
        ValueError: if shapes do not match, or there are more than 128 chunks.
    """
    if partial.ndim != 4 or stats.shape != (*partial.shape[:3], 2):
        raise ValueError(f"partial results {partial.shape} do not match statistics {stats.shape}")
    if partial.dtype != mx.float32 or stats.dtype != mx.float32:
        raise ValueError(
            f"partial results and statistics must be float32, got {partial.dtype} and {stats.dtype}"
        )
    chunks, heads, rows, head_size = partial.shape
    if chunks > MAX_CHUNKS:
        raise ValueError(f"{chunks} chunks are more than {MAX_CHUNKS}")
    return Launch(
        MERGE,
        (partial, stats, mx.array([heads * rows, chunks], dtype=mx.int32)),
        (("T", dtype), ("D", head_size)),
        (32 * heads * rows, 1, 1),
        (32, 1, 1),
        ((heads, rows, head_size),),
        (dtype,),
    )


def run(
    factory: Factory,
    queries: mx.array,
    keys: Cache,
    values: Cache,
    visible: mx.array,
    length: int,
    scale: float,
    chunk: int | None = None,
) -> mx.array:
    """Attention of the block's rows, in one launch, or two if the prefix is long.

    Args:
        factory: builds kernels (`mx.fast.metal_kernel`).
        queries: [Hq, R, D], R <= 32.
        keys, values: the cache's whole buffers: [Hkv, capacity, D] of the type of `queries`, or 8-bit words
            [Hkv, capacity, D / 4] uint32 with scales and biases [Hkv, capacity, D / group] of that type.
        visible: [R] uint32, see `visibility_words`; every row sees itself.
        length: keys in use, including the block's R rows, which come last.
        scale: factor of the scores.
        chunk: keys per chunk, a multiple of 32; None chooses by the shapes.

    Returns:
        [Hq, R, D] of the type of `queries`.

    Raises:
        ValueError: see `launch_partial`.
    """
    out, stats = launch_partial(queries, keys, values, visible, length, scale, chunk).run(factory)
    if out.shape[0] == 1:
        return out[0]
    (merged,) = launch_merge(out, stats, queries.dtype).run(factory)
    return merged


def _rows_in_use(cache: Cache, head_size: int, length: int) -> mx.array:
    """The first `length` rows of a cache, dequantised. [Hkv, length, D]."""
    buffers = [a[:, :length] for a in _arrays(cache)]
    if len(buffers) == 1:
        return buffers[0]
    words, scales, biases = buffers
    return mx.dequantize(words, scales, biases, group_size=head_size // scales.shape[-1], bits=8)


def reference(
    queries: mx.array, keys: Cache, values: Cache, visible: mx.array, length: int, scale: float
) -> mx.array:
    """The same with MLX's operations and a mask array. Arguments and result as in `run`."""
    _, rows, head_size = queries.shape
    mask = mx.concatenate(
        [mx.ones((rows, length - rows), dtype=mx.bool_), visibility_matrix(visible)], axis=1
    )
    k, v = (_rows_in_use(cache, head_size, length)[None] for cache in (keys, values))
    return mx.fast.scaled_dot_product_attention(queries[None], k, v, scale=scale, mask=mask)[0]


def in_place(factory: Factory, arguments: tuple[Any, ...]) -> tuple[Any, Any]:
    """What a model runs with the kernel, and without it: mlx-lm's attention with the pass's precomputed mask."""
    _, keys, _, visible, length, scale = arguments
    rows = visible.shape[0]
    mask: Any = mx.concatenate(
        [mx.ones((rows, length - rows), dtype=mx.bool_), visibility_matrix(visible)], axis=1
    )
    if mx.array_equal(visibility_matrix(visible), mx.tril(mx.ones((rows, rows), dtype=mx.bool_))).item():
        mask = "causal"

    def without(queries: mx.array, keys: Cache, values: Cache, *_: Any) -> mx.array:
        used: list[Any] = [tuple(a[None, :, :length] for a in _arrays(cache)) for cache in (keys, values)]
        if len(used[0]) > 1:
            group_size = queries.shape[-1] // used[0][1].shape[-1]
            return quantized_scaled_dot_product_attention(
                queries[None], used[0], used[1], scale=scale, mask=mask, group_size=group_size, bits=8
            )[0]
        (k,), (v,) = used
        return mx.fast.scaled_dot_product_attention(queries[None], k, v, scale=scale, mask=mask)[0]

    return lambda *a: run(factory, *a), without


def samples() -> list[tuple[Any, ...]]:
    """Sample calls for the self-check: every type and head size, one and several chunks, every tiling, 8 bits."""
    plain = (
        _sample(mx.float16, 64, (6, 2), 5, 97),
        _sample(mx.bfloat16, 128, (8, 1), 8, 1500),
        _sample(mx.float32, 80, (2, 1), 3, 40),
        _sample(mx.float16, 96, (4, 4), 17, 300),
        _sample(mx.bfloat16, 256, (2, 1), 16, 65),
    )
    return [*plain, *(_quantised(_sample(dtype, 128, (6, 2), 3, 531)) for dtype in (mx.float16, mx.bfloat16))]


def _sample(
    dtype: mx.Dtype, head_size: int, heads: tuple[int, int], rows: int, length: int
) -> tuple[Any, ...]:
    """A call with random numbers; a block row sees every third row up to itself. heads: (query, key) heads."""
    parts = mx.random.split(mx.random.key(length), 3)
    queries = mx.random.normal((heads[0], rows, head_size), key=parts[0]).astype(dtype)
    keys, values = (
        mx.random.normal((heads[1], length + 7, head_size), key=part).astype(dtype) for part in parts[1:]
    )
    index = mx.arange(rows)
    visibility = (index[:, None] >= index[None]) & (index[:, None] % 3 == index[None] % 3)
    return queries, keys, values, visibility_words(visibility), length, head_size**-0.5


def _quantised(sample: tuple[Any, ...]) -> tuple[Any, ...]:
    queries, keys, values, *rest = sample
    return queries, mx.quantize(keys, bits=8), mx.quantize(values, bits=8), *rest


def agrees(ours: mx.array, theirs: mx.array) -> bool:
    """Whether two results differ only by rounding: by at most 1e-5 (float32), 5e-3 (float16) or 4e-2 (bfloat16, where
    MLX may round scores and weights between its steps) of the largest value."""
    bound = {mx.float32: 1e-5, mx.float16: 5e-3, mx.bfloat16: 4e-2}[theirs.dtype]
    ours, theirs = ours.astype(mx.float32), theirs.astype(mx.float32)
    return bool((mx.abs(ours - theirs).max() <= bound * mx.abs(theirs).max()).item())


def shape_key(
    queries: mx.array, keys: Cache, values: Cache, visible: mx.array, length: int, scale: float
) -> str:
    """The class of a call in the cache of verdicts: type, rows, heads, head size, and the prefix by powers of two."""
    query_heads, rows, head_size = queries.shape
    buffers = _arrays(keys)
    layout = "" if len(buffers) == 1 else f"q8 g{head_size // buffers[1].shape[-1]} "
    dtype = str(queries.dtype).rsplit(".", 1)[-1]
    heads = f"{query_heads}/{buffers[0].shape[0]} heads x{head_size}"
    return f"{layout}{dtype} {rows} rows {heads} keys<2^{length.bit_length()}"
