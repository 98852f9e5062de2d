"""The micro-batches of a training step, computed in parallel: their mean loss and mean gradients.

What a micro-batch computes is up to a subclass; optimizers and files belong to the trainer.
"""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_map

from mtp_mlx.blas import blas_threads
from mtp_mlx.train.data import Example
from mtp_mlx.train.loss import LossParts
from mtp_mlx.train.workers import Workers

# Of a micro-batch: number of supervised rows, loss, gradients.
Totals = tuple[int, LossParts, dict]


class MicroBatchRunner(ABC):
    """Computes loss and gradients of steps, with micro-batches in parallel on `workers` threads.

    MLX's element-wise operations use one core of a CPU, so two workers take little more time than one. Building a
    graph changes the shared module and happens under a lock; evaluating it does not. On a GPU one worker is best:
    micro-batches run one after another, in the memory of one.
    With several workers, each has one OpenBLAS thread: with more, two workers are slower than one (measured).

    Args:
        trained: the module whose gradients are computed.
        workers: number of threads. If there are several, a subclass must evaluate every other array that its
            micro-batches read: a lazy array belongs to the thread that made it.
    """

    def __init__(self, trained: nn.Module, workers: int = 1) -> None:
        self._trained = trained
        self._building = threading.Lock()
        self._workers = Workers(workers)

    def __call__(self, examples: Sequence[Sequence[Example]], step: int) -> tuple[LossParts, dict, int]:
        """(mean loss, mean gradients, number of supervised rows) of a step's micro-batches."""
        numbers = [step * len(examples) + index for index in range(len(examples))]
        jobs = list(zip(examples, numbers, strict=True))
        if self._workers.count == 1:
            return _mean([self._micro_batch(*job) for job in jobs])
        mx.eval(self._trained.parameters())  # a lazy array belongs to the thread that made it
        with blas_threads(1):
            return _mean(self._workers.map(lambda job: self._micro_batch(*job), jobs))

    def close(self) -> None:
        """Ends the worker threads; the next step starts new ones."""
        self._workers.close()

    def _loss_and_gradients(self, loss: Callable[[], LossParts]) -> tuple[LossParts, dict]:
        """What `loss` returns, and its gradients with respect to the trained parameters, evaluated."""
        names: list[str] = []

        def values() -> tuple[mx.array, ...]:
            result = loss()
            names[:] = list(result.parts)
            return (result.total, *result.parts.values())

        with self._building:
            parameters = self._trained.trainable_parameters()
            found, gradients = nn.value_and_grad(self._trained, values)()
            self._trained.update(parameters)  # tracing leaves this thread's lazy copies in the module
        mx.eval(found, gradients)
        return LossParts(found[0], dict(zip(names, found[1:], strict=True))), gradients

    def _sum(self, losses: Iterable[Callable[[], LossParts]]) -> tuple[LossParts, dict]:
        """Sum of several losses and of their gradients, evaluated; each runs forward and backward before the next."""
        total: tuple[LossParts, dict] | None = None
        for loss in losses:
            found = self._loss_and_gradients(loss)
            total = found if total is None else added(total, found)
        assert total is not None
        return total

    @abstractmethod
    def _micro_batch(self, examples: Sequence[Example], number: int) -> Totals:
        """(supervised rows, loss, gradients of `trained`), evaluated. `number` counts the run's micro-batches."""


def added(one: tuple[LossParts, dict], other: tuple[LossParts, dict]) -> tuple[LossParts, dict]:
    """Sum of two losses and of their gradients, evaluated, so that nothing of both stays in memory."""
    parts = dict(one[0].parts)
    for name, value in other[0].parts.items():
        parts[name] = parts[name] + value if name in parts else value
    loss = LossParts(one[0].total + other[0].total, parts)
    gradients = tree_map(mx.add, one[1], other[1])
    mx.eval(loss.total, loss.parts, gradients)
    return loss, gradients


def _mean(totals: list[Totals]) -> tuple[LossParts, dict, int]:
    """Mean over micro-batches, weighted by supervised rows; the mean of a part is over those that have it."""
    rows = sum(count for count, _, _ in totals)
    shares = [count / max(rows, 1) for count, _, _ in totals]  # without any row, gradients are zero
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
