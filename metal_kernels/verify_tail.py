"""The tail of verification: the picks of a block's real rows and which drafts are accepted, in one launch.

Contract: `run` returns what `Picker.pick` and `leading_run` return, token for token; of a tree of drafts, in place of
the number of accepted ones, which rows are off the accepted path. Greedy and Gumbel picks use
the same float32 operations in the same order. Inverse-CDF picks (Parallel Token Prediction) are the first column
whose cumulative probability exceeds the uniform. These sums are float32 and within CDF_ERROR of the exact ones, so
`run` and `reference` may pick neighbouring columns if the uniform is that close to the border between them. If
scores are equal, the lowest column wins. A row with nothing above -inf gives column 0. Greedy and Gumbel pick the
first NaN, as `mx.argmax` does; under the inverse CDF, NaN has no mass. Non-goals: top-p, min-p, top-k and
penalties; `Picker` does those.

Arguments of every function here, after the factory
    logits   [R, V] float32, float16 or bfloat16; column = token id
    tokens   [R] int32, the block's real tokens: the pending one, then the R - 1 drafts
    temperature  0 is greedy
    noise    None when greedy (temperature 0); uint32 [R, 2] from `row_keys` for Gumbel; float32 [R] in [0, 1) for the
             inverse CDF. Ignored at temperature 0.
    parents  [R - 1] real row that each draft follows, smaller than the draft's own; empty if each follows the one
             before it
"""

from __future__ import annotations

import dataclasses

import mlx.core as mx
import numpy as np

from mtp_mlx.metal_kernels.inverse_cdf import inverse_cdf
from mtp_mlx.metal_kernels.launch import Factory, Launch, Support, read_kernel
from mtp_mlx.metal_kernels.position_noise import gumbel_of_keys, row_keys

GREEDY, GUMBEL, INVERSE_CDF = 0, 1, 2
MODE_NAMES = ("greedy", "gumbel", "inverse cdf")
FLOATS = (mx.float32, mx.float16, mx.bfloat16)
SMALLEST_VOCABULARY = 8
MOST_ELEMENTS = 2**31  # the kernel counts the columns of all rows in 32 bits
SIMD_WIDTH, MOST_THREADS, COLUMNS_PER_THREAD = 32, 1024, 4
CDF_ERROR = (
    2e-6  # of a cumulative probability; under emulation, with up to 262,144 columns: 1e-7, reference: 4e-7
)

NOISE_HEADER = read_kernel("position_noise", (), ()).header
_own = read_kernel(
    "verify_tail",
    inputs=("logits", "tokens", "parents", "noise", "inverse_temperature"),
    outputs=("result",),
    atomic_outputs=True,
)
TEXT = dataclasses.replace(_own, header=NOISE_HEADER + _own.header)

Arguments = tuple[mx.array, mx.array, float, mx.array | None, tuple[int, ...]]


def _mode(temperature: float, noise: mx.array | None) -> int:
    """The kind of pick.

    Raises:
        ValueError: if there is a temperature but no noise, or the noise has another type.
    """
    if temperature == 0:
        return GREEDY
    if noise is None:
        raise ValueError(f"temperature {temperature} needs noise: row keys or uniforms")
    if noise.dtype == mx.uint32:
        return GUMBEL
    if noise.dtype == mx.float32:
        return INVERSE_CDF
    raise ValueError(f"noise is {noise.dtype} but must be uint32 (row keys) or float32 (uniforms)")


def supported(
    logits: mx.array,
    tokens: mx.array,
    temperature: float,
    noise: mx.array | None = None,
    parents: tuple[int, ...] = (),
) -> Support:
    """Whether the kernel supports this call."""
    if logits.dtype not in FLOATS:
        return Support(False, f"logits of type {logits.dtype}")
    if logits.shape[-1] < SMALLEST_VOCABULARY:
        return Support(False, f"fewer than {SMALLEST_VOCABULARY} columns")
    if logits.size >= MOST_ELEMENTS:
        return Support(False, "more logits than 32 bits can count")
    return Support(True)


def _checked(
    logits: mx.array, tokens: mx.array, temperature: float, noise: mx.array | None, parents: tuple[int, ...]
) -> int:
    """Check all shapes and types, and return the mode."""
    if logits.ndim != 2 or logits.shape[0] < 1:
        raise ValueError(f"logits have shape {logits.shape} but must be [rows >= 1, vocabulary]")
    support = supported(logits, tokens, temperature, noise)
    if not support:
        raise ValueError(f"verify_tail does not support this call: {support.reason}")
    n_rows = logits.shape[0]
    if tokens.shape != (n_rows,) or tokens.dtype != mx.int32:
        raise ValueError(f"tokens are {tokens.dtype} {tokens.shape} but must be int32 ({n_rows},)")
    if parents and (
        len(parents) != n_rows - 1 or any(not 0 <= parent <= draft for draft, parent in enumerate(parents))
    ):
        raise ValueError(f"parents {parents} must be {n_rows - 1} rows, each before its own")
    mode = _mode(temperature, noise)
    if mode != GREEDY:
        assert noise is not None
        expected = (n_rows, 2) if mode == GUMBEL else (n_rows,)
        if noise.shape != expected:
            raise ValueError(f"noise has shape {noise.shape} but must be {expected}")
    return mode


def launch(
    logits: mx.array,
    tokens: mx.array,
    temperature: float,
    noise: mx.array | None = None,
    parents: tuple[int, ...] = (),
) -> Launch:
    """The launch, whose output is the two of `run`, one behind the other.

    Raises:
        ValueError: if a shape or type does not match, or the call is not `supported`.
    """
    mode = _checked(logits, tokens, temperature, noise, parents)
    n_rows, n_columns = logits.shape
    simdgroups = -(-n_columns // (SIMD_WIDTH * COLUMNS_PER_THREAD))
    threads = min(MOST_THREADS, SIMD_WIDTH * simdgroups)
    if mode == GREEDY:
        noise = mx.array([0], dtype=mx.uint32)
    assert noise is not None
    inverse = mx.array([1.0 if mode == GREEDY else 1.0 / temperature], dtype=mx.float32)
    return Launch(
        text=TEXT,
        inputs=(logits, tokens, mx.array((0, *parents), dtype=mx.int32), noise, inverse),
        template=(("MODE", mode), ("TREE", int(bool(parents)))),
        grid=(threads, n_rows, 1),
        threadgroup=(threads, 1, 1),
        output_shapes=((2 * n_rows if parents else n_rows + 1,),),
        output_dtypes=(mx.int32,),
        init_value=0 if parents else n_rows - 1,
    )


def run(
    factory: Factory,
    logits: mx.array,
    tokens: mx.array,
    temperature: float,
    noise: mx.array | None = None,
    parents: tuple[int, ...] = (),
) -> tuple[mx.array, mx.array]:
    """Picks, int32 [R], and the number of accepted drafts, int32 [1].

    Of a tree, the second is int32 [R]: 0 for the pending token and the accepted drafts, 1 for all other rows.
    """
    (result,) = launch(logits, tokens, temperature, noise, parents).run(factory)
    n_rows = logits.shape[0]
    return result[:n_rows], result[n_rows:]


def reference(
    logits: mx.array,
    tokens: mx.array,
    temperature: float,
    noise: mx.array | None = None,
    parents: tuple[int, ...] = (),
) -> tuple[mx.array, mx.array]:
    """The same as `run`, in pure MLX."""
    mode = _checked(logits, tokens, temperature, noise, parents)
    scores = logits.astype(mx.float32)
    if mode != GREEDY:
        assert noise is not None
        scores = scores * (1.0 / temperature)
        if mode == GUMBEL:
            scores = scores + gumbel_of_keys(noise, mx.arange(logits.shape[-1]))
        else:
            return _with_accepted(inverse_cdf(scores, noise), tokens, parents)
    return _with_accepted(mx.argmax(scores, axis=-1), tokens, parents)


def _with_accepted(picks: mx.array, tokens: mx.array, parents: tuple[int, ...]) -> tuple[mx.array, mx.array]:
    picks = picks.astype(mx.int32)
    return picks, _off_path(picks, tokens, parents) if parents else _leading_run(picks, tokens)


def _off_path(picks: mx.array, tokens: mx.array, parents: tuple[int, ...]) -> mx.array:
    """[R] int32: 1 for every row whose draft, or one on the way to it, is not the pick of the row before it."""
    found = [mx.zeros((), dtype=mx.bool_)]
    for row, parent in enumerate(parents, start=1):
        found.append(mx.logical_or(found[parent], picks[parent] != tokens[row]))
    return mx.stack(found).astype(mx.int32)


def _leading_run(picks: mx.array, tokens: mx.array) -> mx.array:
    """[1] int32: how many leading drafts (the tokens after the first) equal the pick of the row before them."""
    equal = (picks[:-1] == tokens[1:]).astype(mx.int32)
    return mx.sum(mx.cumprod(equal)).astype(mx.int32).reshape(1)


def samples() -> list[Arguments]:
    """Small sample calls for the self-check: every mode and type, short and uneven rows, 1 to 9 rows.

    Uniforms are in the middle of a likely token's interval, so that the order of summation cannot matter.
    """
    generator = np.random.default_rng(0)
    calls: list[Arguments] = []
    for n_rows, n_columns, dtype in ((1, 37, mx.float32), (4, 1009, mx.float16), (9, 5003, mx.bfloat16)):
        logits = mx.array(generator.normal(size=(n_rows, n_columns)).astype(np.float32) * 2).astype(dtype)
        keys = row_keys(7, mx.arange(n_rows))
        wide = np.array(mx.softmax(logits.astype(mx.float32) * (1 / 0.7), axis=-1)).astype(np.float64)
        middles = (np.cumsum(wide, axis=-1) - wide / 2)[np.arange(n_rows), wide.argmax(-1)]
        for temperature, noise in ((0.0, None), (0.7, keys), (0.7, mx.array(middles.astype(np.float32)))):
            block = mx.zeros((n_rows,), dtype=mx.int32)
            picks, _ = reference(logits, block, temperature, noise)
            drafts = np.concatenate([[0], np.array(picks)[:-1]])
            drafts[n_rows // 2 + 1 :] = n_columns - 1  # the first drafts are right, the rest probably wrong
            calls.append((logits, mx.array(drafts.astype(np.int32)), temperature, noise, ()))
            if n_rows > 2:  # two chains behind the pending token, of which the first is the one before
                parents = (*range(n_rows // 2), 0, *range(n_rows // 2 + 1, n_rows - 1))
                calls.append((logits, mx.array(drafts.astype(np.int32)), temperature, noise, parents))
    return calls


def agrees(ours: tuple[mx.array, mx.array], theirs: tuple[mx.array, mx.array]) -> bool:
    """Whether picks and accepted counts are equal."""
    return all(bool(mx.array_equal(one, other)) for one, other in zip(ours, theirs, strict=True))


def shape_key(
    logits: mx.array,
    tokens: mx.array,
    temperature: float,
    noise: mx.array | None = None,
    parents: tuple[int, ...] = (),
) -> str:
    """The class of calls that cost the same, e.g. "gumbel bfloat16 4x151936"."""
    n_rows, n_columns = logits.shape
    dtype = str(logits.dtype).removeprefix("mlx.core.")
    form = " tree" if parents else ""
    return f"{MODE_NAMES[_mode(temperature, noise)]} {dtype} {n_rows}x{n_columns}{form}"
