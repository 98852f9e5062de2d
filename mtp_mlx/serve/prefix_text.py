"""A text that the model has read, and the lengths of it at which a request can go on."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_map
from mlx_lm.models.cache import CacheList

from mtp_mlx.decode.rollback import is_state, leaves_of


@dataclass
class End:
    """The state behind the first `length` tokens of a text.

    Attributes:
        leaves: by cache, what cannot be trimmed; None for keys and values of all rows.
        used: when it was last used; a running number.
        nbytes: bytes of its copies.
    """

    length: int
    leaves: list[Any]
    used: int = 0
    nbytes: int = field(init=False)

    def __post_init__(self) -> None:
        self.nbytes = _bytes(self.leaves)

    def reach(self, common: int) -> int:
        """The longest prefix of at most `common` tokens to which this end can be trimmed; 0 if there is none."""
        if self.length <= common:
            return self.length
        return common if self.trims else 0

    @property
    def copies(self) -> list[Any]:
        """What cannot be trimmed."""
        return [leaf for leaf in self.leaves if leaf is not None]

    @property
    def trims(self) -> bool:
        """Whether it can be trimmed to any shorter length."""
        return all(leaf is None or leaf.is_trimmable() for leaf in self.leaves)


@dataclass
class Text:
    """A text that the model has read.

    Attributes:
        tokens: [T] int64 ids.
        rows: by cache, keys and values of all T rows; None where the ends have a copy.
        parts: by layer, the number of its caches if it has a list of them, else 0.
        ends: by length; at least one.
        row_bytes: bytes of `rows`.
        saved: whether it is on disk, or nothing more can be done to have it there.
    """

    tokens: np.ndarray
    rows: list[Any]
    parts: list[int]
    ends: list[End]
    row_bytes: int = field(init=False)
    saved: bool = False

    def __post_init__(self) -> None:
        self.row_bytes = _bytes(self.rows)

    @property
    def nbytes(self) -> int:
        """Bytes of all copies."""
        return self.row_bytes + sum(end.nbytes for end in self.ends)

    def cache(self, end: End, length: int) -> list[Any]:
        """A copy of the prompt cache of the first `length` tokens, which `end` can be trimmed to."""
        leaves = []
        for rows, kept in zip(self.rows, end.leaves, strict=True):
            leaf = copy.deepcopy(rows if kept is None else kept)
            surplus = (len(self.tokens) if kept is None else end.length) - length
            if surplus:
                leaf.trim(surplus)
            leaves.append(leaf)
        layers, left = [], iter(leaves)
        for count in self.parts:
            layers.append(CacheList(*(next(left) for _ in range(count))) if count else next(left))
        return layers

    def trim(self) -> None:
        """Trims to the last end, and frees the memory of what was behind it."""
        surplus = len(self.tokens) - self.ends[-1].length
        if not surplus:
            return
        self.tokens = self.tokens[: self.ends[-1].length]
        for leaf in self.rows:
            if leaf is not None and not leaf.empty():
                leaf.trim(surplus)
                held = (leaf.keys, leaf.values)
                leaf.keys, leaf.values = tree_map(
                    lambda rows, n=leaf.offset: mx.contiguous(rows[..., :n, :]), held
                )
                mx.eval(leaf.keys, leaf.values)
        self.row_bytes = _bytes(self.rows)


def _bytes(leaves: list[Any]) -> int:
    return sum(int(leaf.nbytes) for leaf in leaves if leaf is not None)


def common_length(one: np.ndarray, other: np.ndarray) -> int:
    """The length of the common prefix of two texts."""
    shorter = min(len(one), len(other))
    different = np.flatnonzero(one[:shorter] != other[:shorter])
    return int(different[0]) if len(different) else shorter


def text_of(tokens: Sequence[int], cache: list[Any], earlier: Iterable[tuple[int, list[Any]]]) -> Text:
    """The text whose cache this is.

    Args:
        tokens: exactly those that `cache` holds.
        earlier: (length, leaves) of states at shorter lengths, as `Session.copied_states` makes them.
    """
    parts = [len(layer.caches) if isinstance(layer, CacheList) else 0 for layer in cache]
    leaves = leaves_of(cache)
    ends = [End(length, states) for length, states in sorted(earlier, key=lambda one: one[0])]
    last = End(len(tokens), [leaf if is_state(leaf) else None for leaf in leaves])
    rows = [None if is_state(leaf) else leaf for leaf in leaves]
    return Text(np.array(tokens, dtype=np.int64), rows, parts, [*ends, last])
