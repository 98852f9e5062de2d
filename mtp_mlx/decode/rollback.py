"""Roll-back of all layers' caches: `mark` before a pass, `keep` after it.

From a session's first pass on, mlx-lm's prompt cache (a list, changed in place) holds a `WindowCache` or
`KeepingCache` for each sliding window and a `StateCache` for each recurrent state; `hand_back` restores mlx-lm's own
objects with the content that they would have. Ordinary caches stay in the list and are rolled back with their own
`trim`.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_map
from mlx_lm.models.cache import ArraysCache, CacheList, KVCache, QuantizedKVCache, RotatingKVCache

from mtp_mlx.errors import MTPError
from mtp_mlx.model.attach import attach
from mtp_mlx.model.block import Block
from mtp_mlx.model.keeping_cache import KeepingCache
from mtp_mlx.model.seams import check_caches
from mtp_mlx.model.state_cache import StateCache
from mtp_mlx.model.window_cache import WindowCache

# Caches that hold one row a token in text order, in buffers [B, H, rows, D] (or several, if quantised).
MOVABLE = (KVCache, QuantizedKVCache, WindowCache, KeepingCache)


class LayerCaches:
    """The caches of all layers.

    Args:
        layers: mlx-lm's prompt cache, changed in place.
        model_name: model type, for error messages.
        n_known: rows that the caches hold, in case no cache counts them.

    Attributes:
        layers: the same list.
        keeps_paths: whether `keep_path` works with any rows: all caches are of kinds whose rows can be moved.
        marked: rows cached before the newest pass.

    Raises:
        MTPError: if a cache cannot be rolled back, or does not say how many rows it holds.
    """

    def __init__(self, layers: list[Any], model_name: str, n_known: int = 0) -> None:
        check_caches(layers, model_name)
        self.layers, self._name = layers, model_name
        made = [(index, layer, _ours(layer)) for index, layer in enumerate(layers)]
        self._exchanged = [(index, theirs, ours) for index, theirs, ours in made if ours is not theirs]
        leaves = [leaf for _, _, ours in made for leaf in _leaves(ours)]
        self._states = [leaf for leaf in leaves if isinstance(leaf, StateCache)]
        uncounted = len(self._states) == len(leaves) and not all(state.empty() for state in self._states)
        if uncounted and not n_known:
            raise MTPError(
                "`prompt_cache` holds recurrent state only, which does not say how many tokens it has read: "
                "leave it out and give the whole text as the prompt"
            )
        self.keeps_paths = all(type(leaf) in MOVABLE for leaf in leaves)
        self._rows = n_known if uncounted else 0  # rows cached, in case no cache counts them
        self._mark: tuple[int, list[list[Any]]] = (self.length, [])

    def _leaves(self) -> Iterator[Any]:
        for layer in self.layers:
            yield from _leaves(layer)

    @property
    def length(self) -> int:
        """Rows cached."""
        counting = (leaf for leaf in self._leaves() if not isinstance(leaf, ArraysCache))
        leaf = next(counting, None)
        return self._rows if leaf is None else int(leaf.offset)

    @property
    def marked(self) -> int:
        """Rows cached before the newest pass."""
        return self._mark[0]

    def mark(self, n_rows: int) -> None:
        """Call before a pass over `n_rows` rows; from the first call on, the list holds our caches."""
        for index, _, ours in self._exchanged:
            self.layers[index] = ours
        length = self.length
        self._mark = (
            length,
            [list(state.cache) for state in self._states],
        )  # in one assignment: Ctrl-C may come at any time
        for state in self._states:
            state.forget()
        self._rows = length + n_rows

    def check_pass(self, n_rows: int) -> None:
        """Call after the graph of a pass is built.

        Raises:
            MTPError: if a recurrent state was updated by a module that is not recorded.
        """
        for index, state in enumerate(self._states):
            if state.rows != n_rows:
                raise MTPError(
                    f"model type '{self._name}' has no seam 'cache' in recurrent layer {index}: its state is updated "
                    "outside the layer's modules, so rejected drafts cannot be rolled back"
                )

    def keep(self, n_rows: int) -> None:
        """Keeps the first `n_rows` rows of the newest pass and removes the others without a trace."""
        for leaf in self._leaves():
            if not isinstance(leaf, ArraysCache):
                surplus = int(leaf.offset) - self.marked - n_rows
                if surplus > 0:
                    leaf.trim(surplus)
        for state, before in zip(self._states, self._mark[1], strict=False):
            state.keep(n_rows, before)
        self._rows = self.marked + n_rows

    def keep_path(self, rows: Sequence[int]) -> None:
        """Keeps these rows of the newest pass and removes the others; other rows than the first ones are moved.

        Args:
            rows: ascending, from 0.
        """
        first = next((place for place, row in enumerate(rows) if row != place), len(rows))
        if first < len(rows):
            for leaf in self._leaves():
                _move_rows(leaf, int(leaf.offset) - self.marked, rows, first)
        self.keep(len(rows))

    def copies(self) -> list[Any]:
        """Copies of what cannot be trimmed, as caches of mlx-lm's: by leaf; None for keys and values of all rows."""
        copied: list[Any] = []
        for leaf in self._leaves():
            own: Any = None
            if isinstance(leaf, WindowCache):
                own = leaf.copy()
            elif isinstance(leaf, StateCache):
                own = ArraysCache(len(leaf.cache))
                own.cache = [None if array is None else mx.contiguous(array) for array in leaf.cache]
            copied.append(own)
        mx.eval([own.state for own in copied if own is not None])
        return copied

    def hand_back(self) -> None:
        """Restores mlx-lm's own caches in the list. If interrupted by Ctrl-C, a second call does the rest."""
        for index, theirs, ours in self._exchanged:
            if self.layers[index] is ours:
                for leaf in _leaves(ours):
                    if isinstance(leaf, WindowCache):
                        leaf.hand_back()
                self.layers[index] = theirs


def leaves_of(layers: list[Any]) -> list[Any]:
    """The caches of all layers of a prompt cache, of which some have several."""
    return [leaf for layer in layers for leaf in _leaves(layer)]


def is_state(leaf: Any) -> bool:
    """Whether one of mlx-lm's caches may be impossible to trim: recurrent state or a sliding window."""
    return isinstance(leaf, ArraysCache | RotatingKVCache)


def needs_copies(layers: list[Any]) -> bool:
    """Whether some cache of a prompt cache cannot always be trimmed, so that `take_back` needs a copy of it."""
    return any(is_state(leaf) for leaf in leaves_of(layers))


def take_back(layers: list[Any], rows: int, copies: list[Any]) -> None:
    """Takes a prompt cache back to an earlier length, in place.

    Args:
        layers: mlx-lm's prompt cache.
        rows: newest rows to remove.
        copies: what cannot be trimmed, as `LayerCaches.copies` made it at that length; it can be used again.
    """
    kept = iter(copies)

    def back(leaf: Any) -> Any:
        earlier = next(kept)
        if earlier is None:
            leaf.trim(rows)
        return leaf if earlier is None else copy.deepcopy(earlier)

    layers[:] = [
        CacheList(*map(back, layer.caches)) if isinstance(layer, CacheList) else back(layer)
        for layer in layers
    ]


def check_decodes(model: nn.Module) -> None:
    """Refuses a bare model that could not use what is trained for it, after building a pass that is never evaluated.

    Raises:
        MTPError: if it cannot be attached to, or a layer's cache cannot take rejected drafts back.
    """
    attached = attach(model)
    try:
        caches = LayerCaches(attached.make_cache(), attached.name)
        caches.mark(1)
        attached.forward(Block.real(mx.zeros((1, 1), dtype=mx.int32)), caches.layers)
        caches.check_pass(1)
    finally:
        attached.detach()


def _leaves(layer: Any) -> tuple[Any, ...]:
    """The caches of one layer; some layers have several."""
    return tuple(layer.caches) if isinstance(layer, CacheList) else (layer,)


def _move_rows(leaf: Any, newest: int, rows: Sequence[int], first: int) -> None:
    """Moves rows[first:] of the newest pass to the places from `first` on.

    Args:
        leaf: a cache of one of the kinds in `MOVABLE`.
        newest: rows of the newest pass.
    """
    end = leaf.end if isinstance(leaf, WindowCache) else int(leaf.offset)
    start = end - newest
    source = mx.array([start + row for row in rows[first:]])
    places = slice(start + first, start + len(rows))

    def moved(buffer: mx.array) -> mx.array:
        buffer[..., places, :] = buffer[..., source, :]
        return buffer

    leaf.keys, leaf.values = tree_map(moved, (leaf.keys, leaf.values))


def _ours(cache: Any) -> Any:
    """Our replacement for one of mlx-lm's caches, or the same object if it needs none."""
    if isinstance(cache, RotatingKVCache):
        return KeepingCache(cache) if cache.keep else WindowCache(cache)
    if isinstance(cache, ArraysCache):
        return StateCache(cache)
    if isinstance(cache, CacheList):
        parts = [_ours(part) for part in cache.caches]
        changed = any(new is not old for new, old in zip(parts, cache.caches, strict=True))
        return CacheList(*parts) if changed else cache
    return cache
