"""Attention of the few rows of a block over a long KV cache, with the block's visibility computed in the kernel.

Contract: batch of one; R = 1..32 query rows; the last R of the cache's `length` keys are the block's own rows. Row r
sees every key before those and the block rows whose bit is set in `visible[r]`; a row always sees itself. No mask
array. The caches are whole allocated buffers (mlx-lm keeps more room than is in use; a slice would be copied), plain
or in mlx-lm's 8-bit layout (`QuantizedKVCache`: packed words, scales, biases).

The g = Hq / Hkv query heads of a key head are packed with the R rows: a threadgroup serves up to `packed_limit` of
these g * R rows and reads each key and value once for all of them. Beyond the limit the rows are cut into
ceil(g * R / limit) parts, and keys and values are read that many times. Softmax in float32.

Long prefixes take two launches: `launch_partial` cuts the keys into chunks, `launch_merge` joins them.
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
    """Visibility among a block's rows, as one word per row.

    Args:
        visibility: [R, R] bool, R <= 32; `visibility[i, j]` if row i sees row j.

    Returns:
        [R] uint32; bit j of row i is `visibility[i, j]`.

    Raises:
        ValueError: not square, or more than 32 rows.
    """
    if visibility.ndim != 2 or visibility.shape[0] != visibility.shape[1]:
        raise ValueError(f"visibility is square, got {visibility.shape}")
    if visibility.shape[0] > MAX_ROWS:
        raise ValueError(f"a word has {MAX_ROWS} bits, got {visibility.shape[0]} rows")
    bits = mx.left_shift(mx.array(1, mx.uint32), mx.arange(visibility.shape[0], dtype=mx.uint32))
    return mx.sum(visibility.astype(mx.uint32) * bits, axis=1).astype(mx.uint32)


def visibility_matrix(visible: mx.array) -> mx.array:
    """The inverse of `visibility_words`: [R] uint32 -> [R, R] bool."""
    places = mx.arange(visible.shape[0], dtype=mx.uint32)
    return mx.bitwise_and(mx.right_shift(visible[:, None], places[None]), mx.array(1, mx.uint32)) != 0


def _arrays(cache: Cache) -> tuple[mx.array, ...]:
    """A cache's buffers: one, or words, scales and biases."""
    return (cache,) if isinstance(cache, mx.array) else tuple(cache)


def _unsupported_cache(cache: Cache, head_size: int, dtype: mx.Dtype) -> str:
    """Why a cache of this layout cannot be read; "" if it can."""
    buffers = _arrays(cache)
    if buffers[-1].dtype != dtype:
        return f"queries are {dtype}, the cache {buffers[-1].dtype}"
    if len(buffers) == 1:
        return ""
    if len(buffers) != 3 or buffers[0].dtype != mx.uint32:
        return "a quantised cache has words, scales and biases"
    if 4 * buffers[0].shape[-1] != head_size:
        return f"a cache of {32 * buffers[0].shape[-1] // head_size} bits, only 8 are done"
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
    """Whether the kernel can do this call, from shapes and dtypes. Arguments: as `run`; window: a sliding window."""
    head_size, dtype = queries.shape[-1], queries.dtype
    if window is not None:
        return Support(False, "no sliding window")
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
    """Raises ValueError, with both numbers, for anything `launch_partial` does not take."""
    buffers = _arrays(keys)
    if queries.ndim != 3 or any(a.ndim != 3 for a in (*buffers, *_arrays(values))):
        raise ValueError(
            f"queries and caches have three dimensions, got {queries.ndim} and {buffers[0].ndim}"
        )
    support = supported(queries, keys, values, visible, length, 1.0)
    if not support:
        raise ValueError(support.reason)
    (query_heads, rows, head_size), (key_heads, capacity, width) = queries.shape, buffers[0].shape
    if len(buffers) == 1 and width != head_size:
        raise ValueError(f"queries have head size {head_size}, keys {width}")
    if any(a.shape[:2] != (key_heads, capacity) for a in buffers):
        raise ValueError(f"words, scales and biases differ in rows: {[a.shape[:2] for a in buffers]}")
    if query_heads % key_heads:
        raise ValueError(f"{query_heads} query heads are no multiple of {key_heads} key heads")
    if not rows <= length <= capacity:
        raise ValueError(
            f"a length of {length} does not lie between {rows} rows and {capacity} allocated keys"
        )
    if visible.shape != (rows,) or visible.dtype != mx.uint32:
        raise ValueError(f"visible is [{rows}] uint32, got {visible.shape} {visible.dtype}")


def launch_partial(
    queries: mx.array,
    keys: Cache,
    values: Cache,
    visible: mx.array,
    length: int,
    scale: float,
    chunk: int | None = None,
) -> Launch:
    """The pass over the keys. Its outputs: [chunks, Hq, R, D] (float32, or the final type for a single chunk) and
    [chunks, Hq, R, 2] float32.

    Args: as `run`.

    Raises:
        ValueError: shapes or types that do not fit, or a chunk that is no multiple of 32 or makes over 128 chunks.
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
        raise ValueError(f"a chunk of {chunk} keys is no multiple of {TILE}")
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
    """The pass that joins the chunks: [chunks, Hq, R, D] and [chunks, Hq, R, 2] float32 -> [Hq, R, D] of `dtype`.

    Raises:
        ValueError: shapes that do not fit, or more than 128 chunks.
    """
    if partial.ndim != 4 or stats.shape != (*partial.shape[:3], 2):
        raise ValueError(f"partial results {partial.shape} do not fit statistics {stats.shape}")
    if partial.dtype != mx.float32 or stats.dtype != mx.float32:
        raise ValueError(f"partial results and statistics are float32, got {partial.dtype} and {stats.dtype}")
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
    """Attention of the block's rows: one launch, or two where the prefix is long.

    Args:
        factory: makes kernels (`mx.fast.metal_kernel`).
        queries: [Hq, R, D], R <= 32.
        keys, values: the cache's whole buffers: [Hkv, capacity, D] of the type of `queries`, or 8-bit words
            [Hkv, capacity, D / 4] uint32 with scales and biases [Hkv, capacity, D / group] of that type.
        visible: [R] uint32, see `visibility_words`; a row sees itself.
        length: keys in use, the block's R rows included; they come last.
        scale: of the scores.
        chunk: keys per chunk, a multiple of 32; None lets the shapes decide.

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
    """The same in MLX's own operations, with a mask array. Arguments and result: as `run`."""
    _, rows, head_size = queries.shape
    mask = mx.concatenate(
        [mx.ones((rows, length - rows), dtype=mx.bool_), visibility_matrix(visible)], axis=1
    )
    k, v = (_rows_in_use(cache, head_size, length)[None] for cache in (keys, values))
    return mx.fast.scaled_dot_product_attention(queries[None], k, v, scale=scale, mask=mask)[0]


def in_place(factory: Factory, arguments: tuple[Any, ...]) -> tuple[Any, Any]:
    """What a model runs with the kernel and without it: mlx-lm's attention with the pass's mask, made beforehand."""
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
    """Arguments for a self-check: every type and head size, one and several chunks, every layout of rows, 8 bits."""
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
    """One call on random numbers; a block row sees every third row up to itself. heads: of queries, of keys."""
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
    """Whether two results differ by rounding only, as a part of the largest value: 1e-5 for float32, 5e-3 for
    float16, 4e-2 for bfloat16, whose scores and weights MLX may round between its steps."""
    bound = {mx.float32: 1e-5, mx.float16: 5e-3, mx.bfloat16: 4e-2}[theirs.dtype]
    ours, theirs = ours.astype(mx.float32), theirs.astype(mx.float32)
    return bool((mx.abs(ours - theirs).max() <= bound * mx.abs(theirs).max()).item())


def shape_key(
    queries: mx.array, keys: Cache, values: Cache, visible: mx.array, length: int, scale: float
) -> str:
    """The class of a call for the race cache: type, rows, heads, head size, and the prefix by powers of two."""
    query_heads, rows, head_size = queries.shape
    buffers = _arrays(keys)
    layout = "" if len(buffers) == 1 else f"q8 g{head_size // buffers[1].shape[-1]} "
    dtype = str(queries.dtype).rsplit(".", 1)[-1]
    heads = f"{query_heads}/{buffers[0].shape[0]} heads x{head_size}"
    return f"{layout}{dtype} {rows} rows {heads} keys<2^{length.bit_length()}"
