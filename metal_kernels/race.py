"""A race between two implementations of the same call: a chain of dependent calls, rotating inputs, median of rounds.

Independent launches overlap on a GPU, and weights that were just read are still in its cache; neither happens in
decoding. So every call waits for the one before, and several copies of the inputs take turns.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any, cast

import mlx.core as mx
from mlx.utils import tree_flatten, tree_map

COPIES = 4
LARGEST_CACHE = 64 << 20  # bytes; no Apple GPU has more in its last-level cache
CHAIN = 12
ROUNDS = 5
Call = Callable[..., Any]


def race(ours: Call, theirs: Call, arguments: tuple[Any, ...]) -> float:
    """The time of `ours` over the time of `theirs`, measured in turns after a warm-up; below 1, ours is faster."""
    copies = [_rotated(arguments, turn) for turn in range(_copies(arguments))]
    mx.eval(copies)
    _chain(ours, copies)
    _chain(theirs, copies)
    ratios = []
    for _ in range(ROUNDS):
        seconds = _chain(ours, copies)
        ratios.append(seconds / _chain(theirs, copies))
    return statistics.median(ratios)


def _copies(arguments: tuple[Any, ...]) -> int:
    """Number of input copies that take turns: one if the inputs are larger than any cache."""
    held = sum(
        array.nbytes
        for _, array in cast("list[tuple[str, Any]]", tree_flatten(list(arguments)))
        if isinstance(array, mx.array)
    )
    return COPIES if held < LARGEST_CACHE else 1


def _rotated(arguments: tuple[Any, ...], turn: int) -> tuple[Any, ...]:
    """A copy of the arguments in different memory: all matrices are rolled along their first axis by `turn`."""

    def rolled(value: Any) -> Any:
        return mx.roll(value, turn, 0) if turn and isinstance(value, mx.array) and value.ndim >= 2 else value

    return tuple(tree_map(rolled, list(arguments)))


def _chain(call: Call, copies: list[tuple[Any, ...]]) -> float:
    """Seconds for CHAIN calls, each of which waits for the one before."""
    before: list[mx.array] = []
    start = time.perf_counter()
    for index in range(CHAIN):
        arguments = copies[index % len(copies)]
        if before:
            arguments = _after(arguments, before)
        before = [array for _, array in cast("list[tuple[str, mx.array]]", tree_flatten(call(*arguments)))]
    mx.eval(before)
    return time.perf_counter() - start


def _after(arguments: tuple[Any, ...], before: list[mx.array]) -> tuple[Any, ...]:
    """The same arguments, where the first array depends on `before`."""
    arrays = [index for index, value in enumerate(arguments) if isinstance(value, mx.array)]
    first = arrays[0]
    waiting = mx.depends([arguments[first]], before)[0]
    return (*arguments[:first], waiting, *arguments[first + 1 :])
