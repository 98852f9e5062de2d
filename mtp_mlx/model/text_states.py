"""Recurrent state at places of a text, from which slots start in training: kept by pass 1, read by pass 2.

A slot behind the token at position n needs the state after that token, and a state can be as large as the keys and
values of thousands of tokens. So pass 1 does not store the states of all places. It keeps what the recurrence reads
(`TextStates`: the mixers' inputs and the outputs of their linear layers, a few vectors per token), and runs the
recurrence again, in pieces that end at the places, for as many of them as are in memory together. Pass 2 then runs
blocks of slots as a batch, each from its own state (`BlockStates`).
"""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx
import numpy as np
from mlx_lm.models.cache import ArraysCache

from mtp_mlx.model.state_cache import BlockRows, StateCache

States = list[mx.array | None]


class TextStates(StateCache):
    """The cache of one recurrent layer in a pass over whole texts [S, T], which records the layer's mixers."""

    def __init__(self, inner: ArraysCache) -> None:
        super().__init__(inner)
        self._place = (0, -1)  # the sequence and the position that `_states` belongs to
        self._states: States = [None] * len(self.cache)

    def wants_replay(self, *, is_step: bool, rows: int) -> bool:
        """See `StateCache`: always."""
        return True

    def end(self) -> None:
        """Drops the states at the ends of the texts, which nothing reads."""
        self.cache[:] = [None] * len(self.cache)

    @property
    def row_by_row(self) -> bool:
        """Whether its layer goes through a pass row by row, and keeps the state of every row for its gradients."""
        return any(replay.row_by_row for replay in self.replays)

    def arrays(self) -> list[mx.array]:
        """All that is recorded; evaluating it frees the pass's graph."""
        return [array for replay in self.replays for array in replay.arrays()]

    def at(self, sequence: int, places: Sequence[int]) -> States:
        """The states after the tokens at `places` of a sequence, [places, ...] for every entry, evaluated.

        It goes on from the last place of the call before, if that is not behind the first one.

        Args:
            sequence: number of the sequence.
            places: ascending positions; the same one may come several times.
        """
        known, position = self._place
        if known != sequence or position > places[0]:
            position, self._states = -1, [None] * len(self.cache)
        found: list[States] = []
        for place in places:
            if place > position:
                running = ArraysCache(len(self.cache))
                running.state = (list(self._states), None, None)
                for replay in self.replays:
                    replay(running, slice(sequence, sequence + 1), position + 1, place + 1)
                position, self._states = place, list(running.cache)
            found.append(self._states)
        self._place = (sequence, position)
        entries = [[states[entry] for states in found] for entry in range(len(self.cache))]
        states: States = [_joined(arrays) for arrays in entries]
        mx.eval(states, self._states)
        return states


class BlockStates(StateCache):
    """The states that blocks of slots start from. What they come to is not kept: no row follows a block.

    Args:
        states: [n, ...] for every entry, in the order of the blocks.
        lengths: [n] rows of each block; their sum is the rows of the pass, [B, C], in order.
    """

    def __init__(self, states: States, lengths: np.ndarray) -> None:
        inner = ArraysCache(len(states))
        inner.state = (list(states), None, None)
        super().__init__(inner)
        self.blocks = _block_rows(lengths)

    def __setitem__(self, index: int, value: mx.array) -> None:
        """Keeps the state that the blocks start from: layers may be computed again, for their gradients."""


def _joined(arrays: list[mx.array | None]) -> mx.array | None:
    """One entry of several states as a batch; None if the layer does not use that entry."""
    found = [array for array in arrays if array is not None]
    return mx.concatenate(found) if found else None


def _block_rows(lengths: np.ndarray) -> BlockRows:
    """Where the rows of blocks of these lengths are in a batch of blocks of equal length, and back.

    The last row of a shorter block is repeated: what is behind a row does not change it. There are two rows at least,
    because mlx-lm's kernels for a single row have no gradients.
    """
    starts, width = np.cumsum(lengths) - lengths, max(2, int(lengths.max()))
    rows = starts[:, None] + np.minimum(np.arange(width), lengths[:, None] - 1)
    back = np.concatenate([block * width + np.arange(length) for block, length in enumerate(lengths)])
    return BlockRows(mx.array(rows.astype(np.int32)), mx.array(back.astype(np.int32)))
