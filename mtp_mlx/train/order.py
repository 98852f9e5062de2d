"""The order of training examples: a function of (number of examples, seed, step), so there is no state to save.

To resume, a run needs its step only. Permutations come from an integer hash, so they are the same on every machine
and with every version of NumPy.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from mtp_mlx.errors import MTPError

HELD_OUT_STREAM = 2**62  # no epoch number comes near it
BATCH_STREAM = 2**61
WEIGHT_STREAM = 2**60


def _splitmix64(state: np.ndarray) -> np.ndarray:
    """The SplitMix64 mixing function, uint64 [n] -> uint64 [n]."""
    state = state + np.uint64(0x9E3779B97F4A7C15)
    state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return state ^ (state >> np.uint64(31))


def _shuffled(n: int, seed: int, stream: int) -> np.ndarray:
    """A permutation of 0..n-1, int64 [n], a function of (n, seed, stream)."""
    key = np.asarray([seed % 2**64], dtype=np.uint64)
    key = _splitmix64(_splitmix64(key) + np.uint64(stream))
    return np.argsort(_splitmix64(key + np.arange(n, dtype=np.uint64)), kind="stable")


def held_out_indices(n_examples: int, n: int, seed: int) -> set[int]:
    """`n` of the indices 0..n_examples-1, chosen by the seed."""
    return set(_shuffled(n_examples, seed, HELD_OUT_STREAM)[:n].tolist())


class EpochOrder:
    """The examples of each batch: every example once per epoch, in a new order each epoch.

    `batch(step)` depends on its argument only, so a resumed run sees the same batches.

    Args:
        n_examples: number of examples.
        seed: any integer.
        batch_size: examples per batch; the last batch of an epoch may be smaller.
        lengths: [n_examples] tokens per example. If given, batches hold examples of similar length: they are
            sorted within pools of `pool_batches` batches, and then the batches are shuffled.
        pool_batches: larger pools waste less padding and mix less.
        weights: [n_examples] positive, how often each example is seen relative to others. An epoch still has
            n_examples places, and each example gets its share of them, rounded up or down. None: once each.

    Raises:
        MTPError: there are no examples.
        ValueError: `lengths` or `weights` do not fit the examples.
    """

    def __init__(
        self,
        n_examples: int,
        seed: int,
        *,
        batch_size: int = 1,
        lengths: Sequence[int] | None = None,
        pool_batches: int = 16,
        weights: Sequence[float] | None = None,
    ) -> None:
        if n_examples < 1:
            raise MTPError("there are no training examples. Add rows, or hold out fewer.")
        if lengths is not None and len(lengths) != n_examples:
            raise ValueError(f"{len(lengths)} lengths for {n_examples} examples")
        if weights is not None and (len(weights) != n_examples or min(weights) <= 0):
            raise ValueError(f"{len(weights)} weights for {n_examples} examples; all must be positive")
        self.weights = None if weights is None else np.cumsum(np.asarray(weights, dtype=np.float64))
        self.n_examples, self.seed, self.batch_size = n_examples, seed, batch_size
        self.lengths = None if lengths is None else np.asarray(lengths)
        self.pool = batch_size * pool_batches
        self.steps_per_epoch = -(-n_examples // batch_size)
        self._epoch = -1
        self._batches: list[list[int]] = []

    def batch(self, step: int) -> list[int]:
        """Indices of the examples of batch `step`, counted from 0 over all epochs."""
        epoch, offset = divmod(step, self.steps_per_epoch)
        if epoch != self._epoch:
            self._epoch, self._batches = epoch, self._epoch_batches(epoch)
        return list(self._batches[offset])

    def _epoch_batches(self, epoch: int) -> list[list[int]]:
        order = _shuffled(self.n_examples, self.seed, epoch)
        if self.weights is not None:
            order = self._by_weight(epoch)[order]
        if self.lengths is not None:
            pools = (order[start : start + self.pool] for start in range(0, self.n_examples, self.pool))
            order = np.concatenate([pool[np.argsort(self.lengths[pool], kind="stable")] for pool in pools])
        starts = range(0, self.n_examples, self.batch_size)
        batches = [order[start : start + self.batch_size].tolist() for start in starts]
        if self.lengths is None:
            return batches
        return [batches[index] for index in _shuffled(len(batches), self.seed, BATCH_STREAM + epoch)]

    def _by_weight(self, epoch: int) -> np.ndarray:
        """Ascending indices [n_examples]: evenly spaced points on the cumulated weights, shifted each epoch."""
        assert self.weights is not None
        key = _splitmix64(np.asarray([self.seed % 2**64], dtype=np.uint64)) + np.uint64(WEIGHT_STREAM + epoch)
        shift = float(_splitmix64(key)[0] >> np.uint64(32)) / 2.0**32  # [0, 1)
        points = (np.arange(self.n_examples) + shift) / self.n_examples * self.weights[-1]
        return np.minimum(np.searchsorted(self.weights, points, side="right"), self.n_examples - 1)
