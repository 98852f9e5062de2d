"""One training step: examples -> layout -> pass 1 -> pass 2 -> loss and gradients of the adapter.

Owns the batch arithmetic between the passes and the objectives; knows nothing of optimizers or files.
"""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Sequence

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_map

from mtp_mlx.blas import blas_threads
from mtp_mlx.train.data import Example
from mtp_mlx.train.loss import LossParts
from mtp_mlx.train.workers import Workers

# Supervised rows, loss and gradients of a micro-batch.
Totals = tuple[int, LossParts, dict]


class MicroBatchRunner(ABC):
    """Computes loss and gradients of steps; micro-batches run side by side on `workers` threads.

    On a CPU, where MLX's element-wise operations use one core, two workers take little more time than one.
    Building a graph touches the shared module and is done under a lock; evaluating it is not. A GPU wants
    one worker: one micro-batch after another, with the memory of one.
    With several workers OpenBLAS gets one thread for each of them (measured: with its own threads on top, two
    workers are slower than one).

    Args:
        trained: the module whose gradients are computed.
        workers: how many threads; a subclass evaluates every other array it reads where there are several.
    """

    def __init__(self, trained: nn.Module, workers: int = 1) -> None:
        self._trained = trained
        self._building = threading.Lock()
        self._workers = Workers(workers)

    def __call__(self, examples: Sequence[Sequence[Example]], step: int) -> tuple[LossParts, dict, int]:
        """Mean loss, mean gradients and number of supervised rows over the step's micro-batches."""
        numbers = [step * len(examples) + index for index in range(len(examples))]
        jobs = list(zip(examples, numbers, strict=True))
        if self._workers.count == 1:
            return _mean([self._micro_batch(*job) for job in jobs])
        mx.eval(self._trained.parameters())  # a lazy array belongs to the thread that made it
        with blas_threads(1):
            return _mean(self._workers.map(lambda job: self._micro_batch(*job), jobs))

    def close(self) -> None:
        """Ends the worker threads; another step starts them again."""
        self._workers.close()

    @abstractmethod
    def _micro_batch(self, examples: Sequence[Example], number: int) -> Totals:
        """(supervised rows, loss, gradients of `trained`), evaluated. `number` counts micro-batches."""


def _mean(totals: list[Totals]) -> tuple[LossParts, dict, int]:
    """Mean over micro-batches, each weighted by its supervised rows; of parts, over those that have them."""
    rows = sum(count for count, _, _ in totals)
    shares = [count / max(rows, 1) for count, _, _ in totals]  # no row at all: a step without gradients
    losses = [loss for _, loss, _ in totals]
    total = sum((share * loss.total for share, loss in zip(shares, losses, strict=True)), mx.zeros(()))
    parts = {}
    for name in dict.fromkeys(name for loss in losses for name in loss.parts):
        have = [
            (share, loss.parts[name])
            for share, loss in zip(shares, losses, strict=True)
            if name in loss.parts
        ]
        weight = (sum(share for share, _ in have) if len(have) < len(losses) else 1.0) or 1.0
        parts[name] = sum((share / weight * part for share, part in have), mx.zeros(()))
    gradients = tree_map(
        lambda *leaves: sum(share * leaf for share, leaf in zip(shares, leaves, strict=True)),
        *(gradient for _, _, gradient in totals),
    )
    return LossParts(total, parts), gradients, rows
