"""One training step: examples -> layout -> pass 1 -> pass 2 -> loss and gradients of the adapter.

Owns the batch arithmetic between the passes and the objectives; knows nothing of optimizers or files.
"""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_map

from mtp_mlx.blas import blas_threads
from mtp_mlx.model.attach import AttachedModel
from mtp_mlx.train.data import Example
from mtp_mlx.train.grad_checkpoint import checkpointed_layers
from mtp_mlx.train.objectives.base import LossParts, Objective, SlotBatch
from mtp_mlx.train.slot_layout import SlotLayout, build_layout, candidate_anchors
from mtp_mlx.train.two_pass import Prefix, prefix_pass, slot_pass
from mtp_mlx.train.workers import Workers


@dataclass(frozen=True)
class BlockChoice:
    """Which positions carry a block in a step.

    Attributes:
        slots: k slots per block.
        share: share of the candidate positions used, (0, 1].
        most: at most this many blocks per sequence, 0 = no limit.
        chunk_blocks: blocks that share a copy of the prefix.
        depth_decay: weight of depth j is depth_decay ** (j - 1).
    """

    slots: int = 4
    share: float = 1.0
    most: int = 0
    chunk_blocks: int = 16
    depth_decay: float = 1.0

    def layout(self, examples: Sequence[Example], seed: int, step: int, lead: int = 0) -> SlotLayout:
        """The step's layout; positions are drawn from (seed, step) alone, so a resumed run repeats them.

        `lead` as in `build_layout`.
        """
        random = np.random.default_rng((seed, step))
        anchors = []
        for example in examples:
            candidates = candidate_anchors(len(example), example.loss_start)
            count = int(np.ceil(self.share * len(candidates)))
            count = min(count, self.most) if self.most else count
            anchors.append(np.sort(random.permutation(candidates)[:count]))
        return build_layout(
            [example.tokens for example in examples], anchors, self.slots, self.chunk_blocks, lead
        )


@dataclass(frozen=True)
class TeacherTargets:
    """The base model's answers at the real rows that slots must predict (constants of a step)."""

    row: np.ndarray  # [M] index of each supervised slot row into the Q teacher rows
    hidden: mx.array  # [Q, D]
    probs: mx.array  # [Q, C]
    previous: mx.array  # [Q]
    label: mx.array  # [Q] draft column, -1 if none


def draft_columns(attached: AttachedModel) -> np.ndarray:
    """[V] column of the draft head of every id, -1 for ids that cannot be drafted."""
    ids = attached.draft_ids
    if ids is None:
        return np.arange(attached.vocab_size, dtype=np.int32)
    columns = np.full(attached.vocab_size, -1, dtype=np.int32)
    columns[np.array(ids)] = np.arange(len(ids), dtype=np.int32)
    return columns


def teacher_targets(
    attached: AttachedModel, layout: SlotLayout, prefix: Prefix, columns: np.ndarray, chunk_rows: int = 512
) -> TeacherTargets:
    """Base probabilities of the draft columns at every real row some slot must match."""
    rows, row = np.unique(layout.target, return_inverse=True)
    hidden = prefix.hidden[mx.array(rows)]  # [Q, D]
    ids = attached.adapter.draft_ids if attached.adapter is not None else None
    pieces = []
    for start in range(0, len(rows), chunk_rows):
        logits = attached.head(hidden[start : start + chunk_rows]).astype(mx.float32)
        norm = mx.logsumexp(logits, axis=-1, keepdims=True)
        piece = mx.exp((logits if ids is None else logits[:, ids]) - norm)  # [<= chunk, C]
        pieces.append(piece)
    flat = layout.tokens.reshape(-1)
    following = flat[np.minimum(rows + 1, len(flat) - 1)]
    return TeacherTargets(
        row=row.astype(np.int32),
        hidden=hidden,
        probs=mx.concatenate(pieces),
        previous=mx.array(flat[rows]),
        label=mx.array(columns[following]),
    )


def slot_batch(
    hidden: mx.array, layout: SlotLayout, targets: TeacherTargets, columns: np.ndarray, depth_decay: float
) -> SlotBatch:
    """Puts pass 2's latents [M, D] together with what they must predict."""
    weight = depth_decay ** (layout.depth - 1).astype(np.float32)
    return SlotBatch(
        hidden=hidden,
        depth=mx.array(layout.depth),
        weight=mx.array(weight.astype(np.float32)),
        teacher_row=mx.array(targets.row),
        previous=mx.array(layout.previous),
        label=mx.array(columns[layout.label]),
        teacher_hidden=targets.hidden,
        teacher_probs=targets.probs,
        teacher_previous=targets.previous,
        teacher_label=targets.label,
    )


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


def evaluate_constants(attached: AttachedModel) -> None:
    """Evaluates every array the passes read: a lazy one belongs to the thread that made it."""
    assert attached.adapter is not None
    layout = build_layout([[0, 0, 0]], [np.array([0], dtype=np.int32)], slots=1, chunk_blocks=1)
    prefix = prefix_pass(attached, layout)
    hidden = slot_pass(attached, layout, prefix)
    mx.eval(attached.adapter.parameters(), attached.draft_head(hidden), attached.head(hidden))


class StepRunner(MicroBatchRunner):
    """Steps of a mask-token adapter."""

    def __init__(
        self,
        attached: AttachedModel,
        objective: Objective,
        choice: BlockChoice,
        seed: int,
        workers: int = 1,
        grad_checkpoint: bool = False,
    ) -> None:
        assert attached.adapter is not None
        super().__init__(attached.adapter, workers)
        self._attached, self._objective, self._choice, self._seed = attached, objective, choice, seed
        self._grad_checkpoint = grad_checkpoint
        self._columns = draft_columns(attached)
        if workers > 1:
            evaluate_constants(attached)

    def _micro_batch(self, examples: Sequence[Example], number: int) -> Totals:
        """(supervised rows, loss, gradients of the adapter's parameters), evaluated."""
        attached, choice = self._attached, self._choice
        layout = choice.layout(examples, self._seed, number)
        with self._building:
            prefix = prefix_pass(attached, layout)
        mx.eval(prefix.arrays())
        targets = teacher_targets(attached, layout, prefix, self._columns)
        mx.eval(targets.probs)
        names: list[str] = []

        def loss() -> tuple[mx.array, ...]:
            with checkpointed_layers(attached) if self._grad_checkpoint else nullcontext():
                hidden = slot_pass(attached, layout, prefix)
            batch = slot_batch(hidden, layout, targets, self._columns, choice.depth_decay)
            result = self._objective(attached, batch)
            names[:] = list(result.parts)
            return (result.total, *result.parts.values())

        adapter = attached.adapter
        assert adapter is not None
        with self._building:
            parameters = adapter.trainable_parameters()
            values, gradients = nn.value_and_grad(adapter, loss)()
            adapter.update(parameters)  # tracing leaves this thread's lazy copies in the module
        mx.eval(values, gradients)
        return len(layout.rows), LossParts(values[0], dict(zip(names, values[1:], strict=True))), gradients


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
