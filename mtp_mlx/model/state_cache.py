"""Recurrent state (gated delta rule, Mamba, short convolutions) that can go back to any row of the newest step.

A recurrent layer folds every row into one state; a rejected row cannot be cut out of it. So, for each layer:
- before a pass the state is remembered, which costs a reference, since MLX arrays never change;
- in a step over several rows the layer's *mixer* (the module that is given the cache) leaves a recording: its
  arguments, and what its linear layers gave;
- when n of R rows are kept, the remembered state comes back and the mixer runs again over the first n rows of the
  recording. Its linear layers give their recorded rows, so no weight is read a second time but the convolution's few,
  and nothing behind the state is evaluated at all. All rows kept: nothing is done.

So a step costs one more recurrence over at most R rows per recurrent layer, and only after a rejection. The state
equals plain decoding's as far as anything computed for several rows at once does: projections of a row in a block of
R and in a block of one may differ by rounding, and so may the sums of a chunked scan (Mamba-2). The gated delta rule
goes row by row in mlx-lm itself. With `exact`, mixers run row by row and every state between two rows is kept: the
same bits.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_map
from mlx_lm.models.cache import ArraysCache

from mtp_mlx.model.rows import RowContext

Replay = Callable[
    [int], None
]  # runs a mixer over the first n rows again; the states it writes are what counts


class StateCache(ArraysCache):
    """A view of mlx-lm's cache of recurrent state; both hold the same list of arrays.

    Attributes:
        inner: mlx-lm's cache.
        rows: rows of the newest pass that mixers have folded in.
        replays: the recordings of the newest pass, one per mixer that uses this cache.
        between: with `exact`, the states after each row of the newest pass.
    """

    def __init__(self, inner: ArraysCache) -> None:
        self.inner, self.cache = inner, inner.cache
        self.left_padding = self.lengths = None
        self.rows = 0
        self.replays: list[Replay] = []
        self.between: list[list[Any]] = []

    def forget(self) -> None:
        """Before a new pass."""
        self.rows, self.replays, self.between = 0, [], []

    def keep(self, count: int, before: list[Any]) -> None:
        """The state after the first `count` rows of the newest pass, which began with the state `before`.

        Raises:
            ValueError: rows before that pass would have to leave, or the pass was recorded by nobody.
        """
        if count < 0:
            raise ValueError(f"recurrent state cannot give {-count} rows back from before the newest pass")
        if count and count == self.rows:
            return
        if count and self.between:
            self.cache[:] = self.between[count - 1]
            return
        self.cache[:] = before
        if count and not self.replays:
            raise ValueError(f"{count} of {self.rows} rows cannot be kept: the pass was no decoding step")
        for replay in self.replays if count else []:
            replay(count)


# --- recordings ---------------------------------------------------------------------------------------------


@dataclass
class Tape:
    """What the linear layers of one mixer gave in the newest step.

    Attributes:
        rows: R while a step is recorded or played back, else 0.
        playing: it is played back.
        outputs: {linear layer: [B, R, D_out] of each of its calls, or None for a call over anything else}.
        calls: {linear layer: calls of it so far}, while playing.
    """

    rows: int = 0
    playing: bool = False
    outputs: dict[int, list[mx.array | None]] = field(default_factory=dict)
    calls: dict[int, int] = field(default_factory=dict)

    def linear(self, layer: nn.Module, x: mx.array) -> mx.array:
        """layer(x), from the tape where it is there."""
        if not self.rows:
            return layer(x)
        known = self.outputs.setdefault(id(layer), [])
        if not self.playing:
            y = layer(x)
            known.append(y if x.ndim == 3 and x.shape[1] == self.rows else None)
            return y
        call = self.calls.get(id(layer), 0)
        self.calls[id(layer)] = call + 1
        recorded = known[call] if call < len(known) else None
        return layer(x) if recorded is None else recorded[:, : x.shape[1]]


class TapedLinear(nn.Module):
    """A linear layer of a mixer."""

    def __init__(self, base: nn.Module, tape: Tape) -> None:
        super().__init__()
        self.base = base
        self._tape = tape

    def __call__(self, x: mx.array) -> mx.array:
        """[B, R, D_in] -> [B, R, D_out]."""
        return self._tape.linear(self.base, x)

    @property
    def weight(self) -> mx.array:
        """The base weight: some mlx-lm models read a projection's weight directly."""
        return self.base.weight


class Recorder:
    """Records one mixer's steps."""

    def __init__(self, rows: RowContext) -> None:
        self._rows = rows
        self.tape = Tape()

    def call(self, mixer: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """mixer(*args, **kwargs), recorded if it is a step over several rows that moves a `StateCache`."""
        cache = next((a for a in (*args, *kwargs.values()) if isinstance(a, StateCache)), None)
        if cache is None or self.tape.playing:
            return mixer(*args, **kwargs)
        first = next(a for a in (*args, *kwargs.values()) if isinstance(a, mx.array))
        shape, count = first.shape[:2], first.shape[1]
        cache.rows = count
        if not self._rows.is_step or count == 1:
            return mixer(*args, **kwargs)
        if self._rows.n_exact:
            return _row_by_row(mixer, args, kwargs, cache, shape)
        self.tape.rows, self.tape.outputs = count, {}
        try:
            out = mixer(*args, **kwargs)
        finally:
            self.tape.rows = 0
        outputs = self.tape.outputs

        def replay(kept: int) -> None:
            tape = self.tape
            tape.rows, tape.playing, tape.outputs, tape.calls = count, True, outputs, {}
            try:
                mixer(*_some_rows(args, shape, 0, kept), **_some_rows(kwargs, shape, 0, kept))
            finally:
                tape.rows, tape.playing = 0, False

        cache.replays.append(replay)
        return out


def _row_by_row(
    mixer: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    cache: StateCache,
    shape: tuple[int, ...],
) -> Any:
    """Every row in a call of its own; `cache.between` gets the states.

    Where several mixers share a cache, each writes its own entries, so the last one's lists are complete only with
    those of the others: entries of later mixers are copied into what is there.
    """
    before, outputs, between = list(cache.cache), [], []
    for row in range(shape[1]):
        outputs.append(
            mixer(*_some_rows(args, shape, row, row + 1), **_some_rows(kwargs, shape, row, row + 1))
        )
        between.append(list(cache.cache))
    if cache.between:
        for known, new in zip(cache.between, between, strict=True):
            known[:] = [
                now if now is not was else old for old, was, now in zip(known, before, new, strict=True)
            ]
    else:
        cache.between = between
    return tree_map(lambda *rows: mx.concatenate(list(rows), axis=1), outputs[0], *outputs[1:])


def _some_rows(values: Any, shape: tuple[int, ...], first: int, last: int) -> Any:
    """Arguments with rows first..last of every array that has a row for each of the pass's: shape [B, R, ...]."""

    def cut(value: Any) -> Any:
        has_rows = isinstance(value, mx.array) and value.shape[:2] == shape
        return value[:, first:last] if has_rows else value

    if isinstance(values, dict):
        return {name: cut(value) for name, value in values.items()}
    return tuple(cut(value) for value in values)


# --- putting it in place ------------------------------------------------------------------------------------


class RecordedMixer(nn.Module):
    """Mixed into a mixer's class while it is attached; its instances have a `_recorder`."""

    _recorder: Recorder

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The mixer's own call, recorded."""
        return self._recorder.call(super().__call__, args, kwargs)


def find_mixers(layer: nn.Module) -> dict[str, nn.Module]:
    """{path below the layer: module} of the innermost modules that are given a cache."""
    takers = {path: module for path, module in layer.named_modules() if _takes_cache(type(module))}
    return {
        path: module
        for path, module in takers.items()
        if not any(other != path and (not path or other.startswith(f"{path}.")) for other in takers)
    }


def _takes_cache(kind: type) -> bool:
    call = next((vars(base)["__call__"] for base in kind.__mro__ if "__call__" in vars(base)), None)
    return inspect.isfunction(call) and "cache" in inspect.signature(call).parameters


def record(mixer: nn.Module, rows: RowContext) -> Tape:
    """Makes `mixer` record its steps, until `stop_recording`.

    Its class is exchanged instead of wrapping it: the paths of its modules and weights stay what they are.
    """
    own = type(mixer)
    mixer.__class__ = type(own.__name__, (RecordedMixer, own), {"__module__": own.__module__})
    recorder = Recorder(rows)
    object.__setattr__(mixer, "_recorder", recorder)
    return recorder.tape


def stop_recording(mixer: nn.Module) -> None:
    """Undoes `record`."""
    if isinstance(mixer, RecordedMixer):
        mixer.__class__ = type(mixer).__bases__[1]
        object.__delattr__(mixer, "_recorder")
