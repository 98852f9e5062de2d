"""How a training step is cut so that it fits the memory: rows of a slice, threads, gradient checkpointing.

A plan changes what a step costs and never what it computes (design 2.8). The fastest plan that fits is chosen before
the first step; a run that no plan fits is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import mlx.core as mx

from mtp_mlx.errors import MTPError
from mtp_mlx.model.attach import AttachedModel
from mtp_mlx.train.grad_checkpoint import checkpointed_layers
from mtp_mlx.train.memory import MemoryBudget, MemoryEstimate, gigabytes

# These rows keep a CPU's, or a GPU's, matrix products busy; more take more memory.
MOST_ROWS_CPU, MOST_ROWS_GPU = 256, 2048
FEWEST_ROWS = 16


@dataclass(frozen=True)
class StepPlan:
    """A plan.

    Attributes:
        slice_rows: most rows that run forward and backward together in a thread; None for no limit. Sequences that
            a method never cuts run one at a time at least, and with 1 never together.
        workers: micro-batches computed in parallel.
        grad_checkpoint: whether the backward pass recomputes decoder layers.
    """

    slice_rows: int | None = None
    workers: int = 1
    grad_checkpoint: bool = False

    def layers(self, attached: AttachedModel) -> AbstractContextManager[None]:
        """A context in which forward passes keep what this plan says for the backward pass."""
        return checkpointed_layers(attached) if self.grad_checkpoint else nullcontext()

    def __str__(self) -> str:
        rows = "whole micro-batches" if self.slice_rows is None else f"slices of up to {self.slice_rows} rows"
        rows = "sequence by sequence" if self.slice_rows == 1 else rows
        words = [rows, f"{self.workers} at a time" if self.workers > 1 else "one at a time"]
        return ", ".join([*words, *(["gradient checkpointing"] if self.grad_checkpoint else [])])


WHOLE = StepPlan()  # nothing is cut


def on_cpu() -> bool:
    """Whether MLX computes on the CPU by default."""
    return bool(mx.default_device() == mx.Device(mx.cpu))


def sliced_plans(workers: int, most: int, grad_checkpoint: bool | None, fewest: int) -> Iterator[StepPlan]:
    """Plans of a method whose rows can be sliced, fastest first.

    Args:
        workers: most threads.
        most: rows of the largest slices.
        grad_checkpoint: as the user wants it; None: only if nothing else fits.
        fewest: rows that cannot be separated, of a block.
    """
    for recompute in (False, True) if grad_checkpoint is None else (grad_checkpoint,):
        for count in range(workers, 0, -1):
            rows = max(most, fewest)
            while rows >= max(FEWEST_ROWS, fewest):
                yield StepPlan(rows, count, recompute)
                rows //= 2
        if fewest < FEWEST_ROWS:
            yield StepPlan(fewest, 1, recompute)


def fastest_that_fits(
    plans: Iterator[StepPlan], estimate: Callable[[StepPlan], MemoryEstimate], budget: MemoryBudget
) -> StepPlan:
    """The first of the plans whose estimate is within the budget.

    Raises:
        MTPError: there is none; the message says what the smallest would need.
    """
    least: MemoryEstimate | None = None
    for plan in plans:
        found = estimate(plan)
        if found.total <= budget.bytes:
            return plan
        least = found if least is None or found.total < least.total else least
    assert least is not None
    raise MTPError(
        f"this training needs {gigabytes(least.total)} even in the smallest slices, and {budget}: take a smaller or "
        "quantised model, lower `max_length`, or close other programs and raise `memory`"
    )
