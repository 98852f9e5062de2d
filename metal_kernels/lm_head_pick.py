"""LM head and pick fused: tokens and their probabilities for rows whose logits are not needed, in two launches.

Contract: `run` picks by float32 logits that are neither rounded to the model's type nor written to memory. MLX's path
(`reference`) rounds them, so the two can differ, but only where the best scores are that close. The noise is that of
`position_noise`, bit for bit, and depends on real token ids. A row's result does not depend on the other rows or on
their number. If scores are equal, the lowest column wins. The weights are read once for all rows.
Non-goals: heads that scale, cap or add to their logits (granite, gemma2), top-p, min-p, top-k, penalties.

Arguments of every function here, after the factory
    hidden       [R, D] float32, float16 or bfloat16; R is 1 to 16, D a multiple of 32
    weight       [V, D] of hidden's type, or uint32 [V, D * bits / 32] as `mx.quantize` packs it (affine)
    scales, biases  [V, D / group_size] of hidden's type; None with a dense weight
    group_size, bits  32, 64 or 128, and 4 or 8; 0 and 0 with a dense weight
    temperature  0 is greedy
    keys         uint32 [R, 2] from `row_keys`; None when greedy (temperature 0)
    token_ids    [V] int32, the real id of each column of a reduced vocabulary; None when column = id
"""

from __future__ import annotations

import dataclasses
from typing import Any

import mlx.core as mx

from mtp_mlx.metal_kernels.launch import Factory, Launch, Support, read_kernel
from mtp_mlx.metal_kernels.position_noise import gumbel_of_keys, row_keys

FLOATS = (mx.float32, mx.float16, mx.bfloat16)
BITS, GROUP_SIZES = (4, 8), (32, 64, 128)
ROW_COUNTS = (1, 2, 4, 8, 16)  # the compiled variants
MOST_ROWS, SMALLEST_VOCABULARY = ROW_COUNTS[-1], 8
TILE, THREADS = 16, 128  # columns per tile, threads per threadgroup: fixed in the kernel
ENOUGH_PARTS, MOST_TILES = 1024, 8  # number of threadgroups that keeps a GPU busy; most tiles for each
MERGE_THREADS = 256
PROBABILITY_TOLERANCE = (
    3e-2  # relative, for `agrees`: the effect of rounding logits of size up to 4 to bfloat16
)

NOISE_HEADER = read_kernel("position_noise", (), ()).header
_parts = read_kernel(
    "lm_head_pick",
    inputs=("hidden", "weight", "scales", "biases", "keys", "token_ids", "inverse_temperature", "plan"),
    outputs=("part_values", "part_columns"),
)
PARTS_TEXT = dataclasses.replace(_parts, header=NOISE_HEADER + _parts.header)
_merge = read_kernel(
    "lm_head_pick_merge",
    inputs=("part_values", "part_columns", "token_ids", "plan"),
    outputs=("picks", "confidence"),
)
MERGE_TEXT = dataclasses.replace(_merge, header=PARTS_TEXT.header)

MaybeArray = mx.array | None
Arguments = tuple[mx.array, mx.array, MaybeArray, MaybeArray, int, int, float, MaybeArray, MaybeArray]


def _why_not(
    hidden: mx.array,
    weight: mx.array,
    scales: MaybeArray,
    biases: MaybeArray,
    group_size: int,
    bits: int,
    temperature: float,
    keys: MaybeArray = None,
    token_ids: MaybeArray = None,
) -> str:
    """Why the kernel does not support a call, as one clause; "" if it does."""
    if hidden.ndim != 2 or weight.ndim != 2:
        return f"hidden and weight have {hidden.ndim} and {weight.ndim} dimensions, not 2"
    (n_rows, size), n_columns = hidden.shape, weight.shape[0]
    if hidden.dtype not in FLOATS:
        return f"hidden is {hidden.dtype}"
    if not 1 <= n_rows <= MOST_ROWS:
        return f"{n_rows} rows, not 1 to {MOST_ROWS}"
    if size == 0 or size % 32:
        return f"rows of {size} values, not a multiple of 32"
    if n_columns < SMALLEST_VOCABULARY:
        return f"{n_columns} columns, fewer than {SMALLEST_VOCABULARY}"
    if temperature > 0 and (keys is None or keys.dtype != mx.uint32 or keys.shape != (n_rows, 2)):
        found = "missing" if keys is None else f"{keys.dtype} {keys.shape}"
        return f"keys are {found}, not uint32 {(n_rows, 2)}"
    if token_ids is not None and (token_ids.dtype != mx.int32 or token_ids.shape != (n_columns,)):
        return f"token_ids are {token_ids.dtype} {token_ids.shape}, not int32 {(n_columns,)}"
    return _why_not_weight(size, hidden.dtype, weight, scales, biases, group_size, bits)


def _why_not_weight(
    size: int,
    dtype: mx.Dtype,
    weight: mx.array,
    scales: MaybeArray,
    biases: MaybeArray,
    group_size: int,
    bits: int,
) -> str:
    n_columns = weight.shape[0]
    if scales is None:
        if weight.dtype != dtype or weight.shape[1] != size:
            return f"weight is {weight.dtype} {weight.shape}, not {dtype} {(n_columns, size)}"
        return ""
    if biases is None:
        return "the weight is not affine: there are no biases"
    if bits not in BITS or group_size not in GROUP_SIZES or size % group_size:
        return f"{size} values of {bits} bits in groups of {group_size}"
    words, groups = (n_columns, size * bits // 32), (n_columns, size // group_size)
    if weight.dtype != mx.uint32 or weight.shape != words:
        return f"weight is {weight.dtype} {weight.shape}, not uint32 {words}"
    for name, array in (("scales", scales), ("biases", biases)):
        if array.dtype != dtype or array.shape != groups:
            return f"{name} are {array.dtype} {array.shape}, not {dtype} {groups}"
    return ""


def supported(*arguments: Any) -> Support:
    """Whether the kernel supports this call, by shapes and types. Arguments as in `run`, without the factory."""
    reason = _why_not(*arguments)
    return Support(not reason, reason)


def launch_parts(
    hidden: mx.array,
    weight: mx.array,
    scales: MaybeArray,
    biases: MaybeArray,
    group_size: int,
    bits: int,
    temperature: float,
    keys: MaybeArray = None,
    token_ids: MaybeArray = None,
) -> Launch:
    """The first launch: for each part, a few tiles of columns, the values that a pick and its probability need.

    Raises:
        ValueError: if the call is not `supported`.
    """
    reason = _why_not(hidden, weight, scales, biases, group_size, bits, temperature, keys, token_ids)
    if reason:
        raise ValueError(f"lm_head_pick: {reason}")
    n_rows, n_columns = hidden.shape[0], weight.shape[0]
    n_tiles = -(-n_columns // TILE)
    tiles_per_part = min(MOST_TILES, max(1, n_tiles // ENOUGH_PARTS))
    parts = -(-n_tiles // tiles_per_part)
    noisy = temperature > 0
    if not noisy or keys is None:
        keys = mx.array([0], dtype=mx.uint32)
    if scales is None or biases is None:
        scales = biases = hidden
        group_size = bits = 0
    plan = mx.array([tiles_per_part, int(noisy), int(token_ids is not None)], dtype=mx.int32)
    inverse = mx.array([1.0 / temperature if noisy else 1.0], dtype=mx.float32)
    ids = _no_ids() if token_ids is None else token_ids
    n_compiled = next(count for count in ROW_COUNTS if count >= n_rows)
    return Launch(
        text=PARTS_TEXT,
        inputs=(hidden, weight, scales, biases, keys, ids, inverse, plan),
        template=(("T", hidden.dtype), ("BITS", bits), ("GROUP", group_size), ("ROWS", n_compiled)),
        grid=(THREADS * parts, 1, 1),
        threadgroup=(THREADS, 1, 1),
        output_shapes=((4, n_rows, parts), (n_rows, parts)),
        output_dtypes=(mx.float32, mx.int32),
    )


def launch_merge(
    part_values: mx.array, part_columns: mx.array, n_columns: int, token_ids: MaybeArray = None
) -> Launch:
    """The second launch: combines the parts.

    Args:
        part_values, part_columns: the outputs of `launch_parts`.
        n_columns: V.
        token_ids: as in `launch_parts`.

    Raises:
        ValueError: if the shapes do not match.
    """
    if part_values.shape != (4, *part_columns.shape):
        raise ValueError(f"part_values {part_values.shape} do not match part_columns {part_columns.shape}")
    n_rows, parts = part_columns.shape
    threads = min(MERGE_THREADS, 32 * -(-parts // 32))
    plan = mx.array([n_columns, int(token_ids is not None)], dtype=mx.int32)
    return Launch(
        text=MERGE_TEXT,
        inputs=(part_values, part_columns, _no_ids() if token_ids is None else token_ids, plan),
        template=(),
        grid=(threads, n_rows, 1),
        threadgroup=(threads, 1, 1),
        output_shapes=((n_rows,), (n_rows,)),
        output_dtypes=(mx.int32, mx.float32),
    )


def _no_ids() -> mx.array:
    return mx.array([0] * SMALLEST_VOCABULARY, dtype=mx.int32)  # large enough to be placed in `device` memory


def run(
    factory: Factory,
    hidden: mx.array,
    weight: mx.array,
    scales: MaybeArray,
    biases: MaybeArray,
    group_size: int,
    bits: int,
    temperature: float,
    keys: MaybeArray = None,
    token_ids: MaybeArray = None,
) -> tuple[mx.array, mx.array]:
    """Picked real ids, int32 [R], and their probabilities, float32 [R], like `Picker.pick_with_confidence`.

    Raises:
        ValueError: if the call is not `supported`.
    """
    parts = launch_parts(hidden, weight, scales, biases, group_size, bits, temperature, keys, token_ids)
    values, columns = parts.run(factory)
    picks, confidence = launch_merge(values, columns, weight.shape[0], token_ids).run(factory)
    return picks, confidence


def reference(
    hidden: mx.array,
    weight: mx.array,
    scales: MaybeArray,
    biases: MaybeArray,
    group_size: int,
    bits: int,
    temperature: float,
    keys: MaybeArray = None,
    token_ids: MaybeArray = None,
) -> tuple[mx.array, mx.array]:
    """The same as `run`, with MLX's head and a pick from its logits."""
    reason = _why_not(hidden, weight, scales, biases, group_size, bits, temperature, keys, token_ids)
    if reason:
        raise ValueError(f"lm_head_pick: {reason}")
    if scales is None:
        scores = (hidden @ weight.T).astype(mx.float32)
    else:
        scores = mx.quantized_matmul(
            hidden, weight, scales, biases, transpose=True, group_size=group_size, bits=bits
        ).astype(mx.float32)
    noisy = scores
    if temperature > 0:
        assert keys is not None
        ids = mx.arange(weight.shape[0]) if token_ids is None else token_ids
        scores = scores * (1.0 / temperature)
        noisy = scores + gumbel_of_keys(keys, ids)
    columns = mx.argmax(noisy, axis=-1)
    picked = mx.take_along_axis(scores, columns[:, None], axis=-1).squeeze(-1)
    confidence = mx.exp(picked - mx.logsumexp(scores, axis=-1))
    return (columns if token_ids is None else token_ids[columns]).astype(mx.int32), confidence


def sample(
    n_rows: int,
    n_columns: int,
    size: int,
    dtype: mx.Dtype,
    group_size: int,
    bits: int,
    temperature: float,
    seed: int,
) -> Arguments:
    """Random arguments whose best scores are far apart: in every row one column is the most likely by far.

    The favoured column of a row is parallel to its hidden state and scores about 8, where other scores have size 1.
    Every second call has a reduced vocabulary. MLX's global random state is not touched.
    """
    hidden_key, weight_key = mx.random.split(mx.random.key(seed))
    hidden = mx.random.normal((n_rows, size), key=hidden_key)
    weight = mx.random.normal((n_columns, size), key=weight_key) * size**-0.5
    favoured = (mx.arange(n_rows) * 7919 + seed) % n_columns
    weight[favoured] = (
        hidden * (8.0 * max(temperature, 1.0)) / mx.sum(hidden * hidden, axis=-1, keepdims=True)
    )
    hidden, weight = hidden.astype(dtype), weight.astype(dtype)
    keys = row_keys(seed, mx.arange(n_rows)) if temperature else None
    ids = None if seed % 2 else (mx.arange(n_columns) * 3 + 1).astype(mx.int32)
    if not bits:
        return hidden, weight, None, None, 0, 0, temperature, keys, ids
    packed, scales, biases = mx.quantize(weight, group_size=group_size, bits=bits)
    return hidden, packed, scales, biases, group_size, bits, temperature, keys, ids


def samples() -> list[Arguments]:
    """Small sample calls for the self-check: every type, dense and both bit widths, full and partial tiles."""
    return [
        sample(1, 37, 96, mx.float32, 0, 0, 0.0, 1),
        sample(3, 1009, 160, mx.float16, 32, 4, 0.0, 2),
        sample(7, 530, 192, mx.bfloat16, 64, 8, 0.2, 3),
        sample(16, 2049, 640, mx.bfloat16, 128, 4, 0.2, 4),
    ]


def agrees(ours: tuple[mx.array, mx.array], theirs: tuple[mx.array, mx.array]) -> bool:
    """Whether the picks are equal and the probabilities agree within PROBABILITY_TOLERANCE."""
    close = mx.allclose(ours[1], theirs[1], rtol=PROBABILITY_TOLERANCE, atol=1e-6)
    return bool(mx.array_equal(ours[0], theirs[0])) and bool(close)


def shape_key(*arguments: Any) -> str:
    """The class of calls that cost the same, e.g. "gumbel q4 g64 bfloat16 3x49152x576"."""
    hidden, weight, scales, _, group_size, bits, temperature, *_ = arguments
    dtype = str(hidden.dtype).removeprefix("mlx.core.")
    kind = "dense" if scales is None else f"q{bits} g{group_size}"
    mode = "gumbel" if temperature > 0 else "greedy"
    return f"{mode} {kind} {dtype} {hidden.shape[0]}x{weight.shape[0]}x{hidden.shape[1]}"
