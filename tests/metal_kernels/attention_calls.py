"""Calls of block_attention for its tests: random arguments, the float64 answer, and ways to execute them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np

from mtp_mlx.metal_kernels import block_attention as attention
from mtp_mlx.metal_kernels.launch import Launch
from tests.metal_kernels import emulated

F32, F16, BF16 = mx.float32, mx.float16, mx.bfloat16
# Rounding of the result and of nothing else: half a unit in the last place, and float32 sums.
BOUND = {F32: 4e-6, F16: 2**-11 + 4e-6, BF16: 2**-8 + 4e-6}


class Case(NamedTuple):
    """Shapes of one call.

    Attributes:
        chunk: keys per chunk, None for the wrapper's own choice.
        group: elements per scale of an 8-bit cache, None for a plain one.
    """

    dtype: mx.Dtype
    head_size: int
    query_heads: int
    key_heads: int
    rows: int
    length: int
    chunk: int | None = None
    group: int | None = None

    def __str__(self) -> str:
        layout = f"q8g{self.group}-" if self.group else ""
        shape = f"D{self.head_size}-{self.query_heads}over{self.key_heads}-R{self.rows}"
        return f"{layout}{str(self.dtype).rsplit('.', 1)[-1]}-{shape}"


def call(case: Case, chill: float = 0.0) -> tuple[Any, ...]:
    """Random arguments. Keys and values from `length` on are NaN: they must never influence anything.

    chill: about how far below zero every score lies.
    """
    rng = np.random.default_rng(case.length * 100 + case.rows)
    queries = rng.normal(size=(case.query_heads, case.rows, case.head_size))
    keys, values = rng.normal(size=(2, case.key_heads, case.length + 5, case.head_size))
    if chill:
        queries[..., 0], keys[..., 0] = chill, -16.0
    seen = np.tril(rng.random((case.rows, case.rows)) < 0.6) | np.eye(case.rows, dtype=bool)
    caches = [_cache(array, case) for array in (keys, values)]
    words = attention.visibility_words(mx.array(seen))
    return mx.array(queries).astype(case.dtype), *caches, words, case.length, 1 / 16


def _cache(array: np.ndarray, case: Case) -> attention.Cache:
    plain = mx.array(array).astype(case.dtype)
    poison = mx.arange(plain.shape[1])[:, None] >= case.length
    if case.group is None:
        return mx.where(poison, mx.array(mx.nan, case.dtype), plain)
    words, scales, biases = mx.quantize(plain, group_size=case.group, bits=8)
    return words, *(mx.where(poison, mx.array(mx.nan, case.dtype), a) for a in (scales, biases))


def plain(cache: attention.Cache, dtype: mx.Dtype) -> np.ndarray:
    """A cache's elements in float64; those of an 8-bit cache are rounded to `dtype`, as the contract says."""
    if isinstance(cache, mx.array):
        return np.array(cache.astype(F32)).astype(np.float64)
    words, scales, biases = (np.array(a if a.dtype == mx.uint32 else a.astype(F32)) for a in cache)
    levels = words.view(np.uint8).astype(np.float32).reshape(*scales.shape, -1)
    exact = (levels * scales[..., None] + biases[..., None]).reshape(*words.shape[:2], -1)
    return np.array(mx.array(exact).astype(dtype).astype(F32)).astype(np.float64)


def answer(
    queries: mx.array,
    keys: attention.Cache,
    values: attention.Cache,
    visible: mx.array,
    length: int,
    scale: float,
) -> np.ndarray:
    """Attention in float64, key by key as the contract says it. [Hq, R, D]."""
    q, k, v = plain(queries, queries.dtype), plain(keys, queries.dtype), plain(values, queries.dtype)
    words, rows, group = visible.tolist(), q.shape[1], q.shape[0] // k.shape[0]
    out = np.zeros_like(q)
    for head in range(q.shape[0]):
        for row in range(rows):
            own = [length - rows + j for j in range(rows) if words[row] >> j & 1]
            seen = [*range(length - rows), *own]
            scores = k[head // group, seen] @ q[head, row] * scale
            weights = np.exp(scores - scores.max())
            out[head, row] = weights @ v[head // group, seen] / weights.sum()
    return out


def executions() -> list[Callable[[Launch], list[mx.array]]]:
    """Ways to execute a launch: emulated under three schedules, or on the GPU where there is one."""
    return [
        lambda launch, schedule=schedule: emulated.run(launch, schedule) for schedule in emulated.SCHEDULES
    ]


def attend(
    arguments: tuple[Any, ...],
    chunk: int | None = None,
    execute: Callable[[Launch], list[mx.array]] = emulated.run,
    edit: Callable[[Launch], Launch] = lambda launch: launch,
) -> mx.array:
    """`attention.run`, each launch executed by `execute` and first changed by `edit`."""
    out, stats = execute(edit(attention.launch_partial(*arguments, chunk)))
    if out.shape[0] == 1:
        return out[0]
    return execute(edit(attention.launch_merge(out, stats, arguments[0].dtype)))[0]


def distance(result: mx.array, wanted: np.ndarray) -> float:
    """Largest difference, as a part of the largest value; NaN counts as infinite."""
    off = np.abs(np.array(result.astype(F32)).astype(np.float64) - wanted).max() / np.abs(wanted).max()
    return float("inf") if np.isnan(off) else float(off)
