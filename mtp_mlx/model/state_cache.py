"""Recurrent state (gated delta rule, Mamba, short convolutions) with roll-back to any row of the newest step.

A recurrent layer folds every row into one state, from which a rejected row cannot be removed. So, for each layer:
- before a pass the state is saved, which costs only a reference, since MLX arrays are immutable;
- in a step over several rows, the layer's *mixer* (the module that takes the cache) records its arguments and the
  outputs of its linear layers;
- if n of R rows are kept, the saved state is restored and the mixer runs again over the first n recorded rows. Its
  linear layers return their recorded outputs, so no weights are read again except the few of the convolution, and
  nothing that follows the state is evaluated. If all rows are kept, nothing is done.

So a step costs at most one more recurrence over R rows per recurrent layer, and only after a rejection. The state
equals that of plain decoding up to rounding: the projections of a row may differ between a block of R rows and a
block of one, and so may the sums of a chunked scan (Mamba-2). The gated delta rule goes row by row in mlx-lm itself.
With `exact`, mixers run row by row and every state between two rows is kept, which gives the same bits.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_map
from mlx_lm.models.cache import ArraysCache

from mtp_mlx.model.rows import RowContext


@dataclass(frozen=True)
class BlockRows:
    """How the rows of a pass are divided into blocks that know nothing of one another.

    Attributes:
        rows: [blocks, width] int32, the rows of every block; shorter blocks repeat their last row.
        back: [B * C] int32, the place of every row of the pass among the blocks * width.
    """

    rows: mx.array
    back: mx.array


class StateCache(ArraysCache):
    """A view of mlx-lm's cache of recurrent state; both hold the same list of arrays.

    Attributes:
        inner: mlx-lm's cache.
        rows: rows of the newest pass that are folded into the state.
        replays: replays of the newest pass, one per mixer that uses this cache.
        between: with `exact`, the states after each row of the newest pass.
        blocks: the blocks of the pass, each with a state of its own; None for rows that follow one another.
    """

    def __init__(self, inner: ArraysCache) -> None:
        self.inner, self.cache = inner, inner.cache
        self.left_padding = self.lengths = None
        self.rows = 0
        self.blocks: BlockRows | None = None
        self.replays: list[Replay] = []
        self.between: list[list[Any]] = []

    def wants_replay(self, *, is_step: bool, rows: int) -> bool:
        """Whether mixers must record a pass over so many rows; a step of one row is kept or removed whole."""
        return is_step and rows > 1

    def forget(self) -> None:
        """Drops the recordings of the last pass; call before a new one."""
        self.rows, self.replays, self.between = 0, [], []

    def keep(self, count: int, before: list[Any]) -> None:
        """Sets the state to that after the first `count` rows of the newest pass, which began with `before`.

        Raises:
            ValueError: if rows before that pass would have to be removed, or the pass was not recorded.
        """
        if count < 0:
            raise ValueError(f"recurrent state cannot be rolled back by {-count} rows before the newest pass")
        if count and count == self.rows:
            return
        if count and self.between:
            self.cache[:] = self.between[count - 1]
            return
        self.cache[:] = before
        if count and not self.replays:
            raise ValueError(f"{count} of {self.rows} rows cannot be kept: the pass was not a decoding step")
        for replay in self.replays if count else []:
            replay(self, slice(None), 0, count)


@dataclass
class Tape:
    """The outputs of one mixer's linear layers in the newest step.

    Attributes:
        rows: R while a step is recorded or played back, else 0.
        playing: whether it is played back.
        outputs: {id of a linear layer: per call its output [B, R, D_out], or None if the input was not the R rows}.
        calls: {id of a linear layer: calls so far}, while played back.
        sequences, first: what is played back, from which row on.
    """

    rows: int = 0
    sequences: slice = field(default_factory=lambda: slice(None))
    first: int = 0
    playing: bool = False
    outputs: dict[int, list[mx.array | None]] = field(default_factory=dict)
    calls: dict[int, int] = field(default_factory=dict)

    def linear(self, layer: nn.Module, x: mx.array) -> mx.array:
        """layer(x), from the tape if it is recorded there."""
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
        return (
            layer(x) if recorded is None else recorded[self.sequences, self.first : self.first + x.shape[1]]
        )


class TapedLinear(nn.Module):
    """A linear layer of a mixer, with its tape."""

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


class Replay:
    """Runs a mixer again over rows of a recorded pass, for the states that it writes.

    Args:
        module: the mixer.
        mixer: its own call.
        args, kwargs: of the recorded call.
        shape: (B, R) of the pass.
        tape: the mixer's tape, with the outputs of that call.
        rows: of the model.

    Attributes:
        row_by_row: whether the mixer goes through a pass row by row; mlx-lm's `ssm_update` does not.
    """

    def __init__(
        self,
        module: nn.Module,
        mixer: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        shape: tuple[int, ...],
        tape: Tape,
        rows: RowContext,
    ) -> None:
        self._mixer, self._args, self._kwargs, self._shape = mixer, args, kwargs, shape
        self.row_by_row = not hasattr(sys.modules[type(module).__module__], "ssm_update")
        self._tape, self._outputs, self._rows = tape, tape.outputs, rows

    def __call__(self, cache: ArraysCache, sequences: slice, first: int, last: int) -> None:
        """Updates `cache`, the state of some sequences after row `first` - 1, by the rows `first` to `last` - 1."""

        def cut(value: Any) -> Any:
            if isinstance(value, StateCache):
                return cache
            has_rows = isinstance(value, mx.array) and value.shape[:2] == self._shape
            return value[sequences, first:last] if has_rows else value

        tape = self._tape
        tape.rows, tape.playing, tape.outputs, tape.calls = self._shape[1], True, self._outputs, {}
        tape.sequences, tape.first = sequences, first
        # Rows from the first on are where the recorded call says; a mixer may turn others by their positions.
        positions = mx.arange(first, last) if first else None
        try:
            with self._rows.placed(positions):
                self._mixer(
                    *map(cut, self._args), **{name: cut(value) for name, value in self._kwargs.items()}
                )
        finally:
            tape.rows, tape.playing = 0, False

    def arrays(self) -> list[mx.array]:
        """What it reads of the recorded pass."""
        given = [value for value in (*self._args, *self._kwargs.values()) if isinstance(value, mx.array)]
        return given + [output for known in self._outputs.values() for output in known if output is not None]


class Recorder:
    """Records the passes of one mixer, `module`."""

    def __init__(self, module: nn.Module, rows: RowContext) -> None:
        self._module, self._rows = module, rows
        self.tape = Tape()

    def call(self, mixer: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """mixer(*args, **kwargs), recorded if it is a step over several rows that updates a `StateCache`."""
        cache = next((a for a in (*args, *kwargs.values()) if isinstance(a, StateCache)), None)
        if cache is None or self.tape.playing:
            return mixer(*args, **kwargs)
        first = next(a for a in (*args, *kwargs.values()) if isinstance(a, mx.array))
        shape, count = first.shape[:2], first.shape[1]
        cache.rows = count
        if cache.blocks is not None:
            return self._by_block(mixer, args, kwargs, cache.blocks, shape)
        if not cache.wants_replay(is_step=self._rows.is_step, rows=count):
            return mixer(*args, **kwargs)
        if self._rows.n_exact:
            return self._row_by_row(mixer, args, kwargs, cache, shape)
        self.tape.rows, self.tape.outputs = count, {}
        try:
            out = mixer(*args, **kwargs)
        finally:
            self.tape.rows = 0
        cache.replays.append(Replay(self._module, mixer, args, kwargs, shape, self.tape, self._rows))
        return out

    def _by_block(
        self,
        mixer: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        blocks: BlockRows,
        shape: tuple[int, ...],
    ) -> Any:
        """Runs the blocks of a pass as a batch; differentiable, as layers are in training mode."""

        def batched(value: Any) -> Any:
            if not isinstance(value, mx.array) or value.shape[:2] != shape:
                return value
            return value.reshape(-1, *value.shape[2:])[blocks.rows]

        positions = self._rows.positions
        if positions is not None:
            positions = mx.broadcast_to(positions, shape).reshape(-1)[blocks.rows]
        with self._rows.placed(positions), _in_training(self._module):
            out = mixer(*map(batched, args), **{name: batched(value) for name, value in kwargs.items()})
        return tree_map(lambda y: y.reshape(-1, *y.shape[2:])[blocks.back].reshape(*shape, *y.shape[2:]), out)

    def _row_by_row(
        self,
        mixer: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        cache: StateCache,
        shape: tuple[int, ...],
    ) -> Any:
        """Runs every exact row in a call of its own, then the slots in one, and stores the states in `cache.between`.

        Several mixers may share a cache, each with entries of its own; the entries of later mixers are then merged
        into the states that the earlier ones stored.
        """

        def run(first: int, last: int) -> Any:
            found = mixer(*_some_rows(args, shape, first, last), **_some_rows(kwargs, shape, first, last))
            between.append(list(cache.cache))
            return found

        before, between = list(cache.cache), []  # type: ignore[var-annotated]
        n_exact, n_slots = self._rows.n_exact, shape[1] - self._rows.n_exact
        outputs = [run(row, row + 1) for row in range(n_exact)]
        if n_slots > 0:
            with self._rows.slots_alone():
                outputs.append(run(n_exact, shape[1]))
        if cache.between:
            for known, new in zip(cache.between, between, strict=True):
                known[:] = [
                    now if now is not was else old for old, was, now in zip(known, before, new, strict=True)
                ]
        else:
            cache.between = between
        return tree_map(lambda *rows: mx.concatenate(list(rows), axis=1), outputs[0], *outputs[1:])


def _some_rows(values: Any, shape: tuple[int, ...], first: int, last: int) -> Any:
    """The arguments, with every array of shape [B, R, ...] cut to rows `first` to `last`."""

    def cut(value: Any) -> Any:
        has_rows = isinstance(value, mx.array) and value.shape[:2] == shape
        return value[:, first:last] if has_rows else value

    if isinstance(values, dict):
        return {name: cut(value) for name, value in values.items()}
    return tuple(cut(value) for value in values)


class RecordedMixer(nn.Module):
    """Mixin for a mixer's class while its model is attached; its instances have a `_recorder`."""

    _recorder: Recorder

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The mixer's own call, recorded."""
        return self._recorder.call(super().__call__, args, kwargs)


@contextmanager
def _in_training(mixer: nn.Module) -> Iterator[None]:
    """mlx-lm's mixers use kernels without gradients outside of training mode."""
    was = mixer.training
    mixer.train(True)
    try:
        yield
    finally:
        mixer.train(was)


def find_mixers(layer: nn.Module) -> dict[str, nn.Module]:
    """{path below the layer: module} of the innermost modules that take a cache."""
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
    """Makes `mixer` record its steps until `stop_recording`.

    Its class is replaced instead of wrapping it, so the paths of its modules and weights do not change.
    """
    own = type(mixer)
    mixer.__class__ = type(own.__name__, (RecordedMixer, own), {"__module__": own.__module__})
    recorder = Recorder(mixer, rows)
    object.__setattr__(mixer, "_recorder", recorder)
    return recorder.tape


def stop_recording(mixer: nn.Module) -> None:
    """Undoes `record`."""
    if isinstance(mixer, RecordedMixer):
        mixer.__class__ = type(mixer).__bases__[1]
        object.__delattr__(mixer, "_recorder")
