"""A micro-batch of online self-distillation that changes real rows too: ordinary LoRA, or a full fine-tune.

One joint pass runs the student over the rows of `region_layout`, real tokens and masks together. Another runs the
frozen teacher over the same rows with the student's tokens in place of the masks (arXiv 2602.06019).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mtp_mlx.drafters.masks.online_loss import Online, student_context
from mtp_mlx.drafters.masks.regions import RegionLayout, draw_regions, region_layout, regions_over
from mtp_mlx.drafters.slots.adapter import adapter_of
from mtp_mlx.drafters.slots.layout import candidate_anchors
from mtp_mlx.model.attach import AttachedModel
from mtp_mlx.model.block import Block
from mtp_mlx.model.cache import prefix_caches
from mtp_mlx.model.seams import cache_leaves
from mtp_mlx.train.data import Example
from mtp_mlx.train.loss import LossParts, sum_over_chunks
from mtp_mlx.train.step import MicroBatchRunner, Totals


class Student(ABC):
    """A model that is trained, and its frozen teacher.

    Attributes:
        attached: the model.
        trained: the module that is trained.
    """

    attached: AttachedModel
    trained: nn.Module

    def hidden(self, block: Block, caches: list[Any]) -> mx.array:
        """Hidden states of the student, [B, S, D]."""
        return self.attached.forward(block, caches)

    @abstractmethod
    def teacher_logits(self, block: Block, caches: list[Any], rows: mx.array) -> mx.array:
        """Logits of the teacher at `rows`, [B, rows, V]; constants."""


class LowRankStudent(Student):
    """Ordinary LoRA: active on all rows of the student and on no row of the teacher."""

    def __init__(self, attached: AttachedModel) -> None:
        self.attached, self.trained = attached, adapter_of(attached)

    def teacher_logits(self, block: Block, caches: list[Any], rows: mx.array) -> mx.array:
        """See `Student`."""
        closed = replace(block, n_real=block.ids.shape[1])
        return self.attached.head(self.attached.forward(closed, caches)[:, rows])


class WholeStudent(Student):
    """A full fine-tune: the teacher's pass runs with the initial weights."""

    def __init__(self, attached: AttachedModel) -> None:
        self.attached, self.trained = attached, attached.model
        self._frozen = attached.model.parameters()

    def teacher_logits(self, block: Block, caches: list[Any], rows: mx.array) -> mx.array:
        """See `Student`."""
        now = self.trained.parameters()
        self.trained.update(self._frozen)
        try:
            return self.attached.head(self.attached.forward(block, caches)[:, rows])
        finally:
            self.trained.update(now)


class JointRunner(MicroBatchRunner):
    """Steps of a `Student`.

    Args:
        student: model and teacher.
        objective: see `Online`.
        k_most: tokens that a region predicts at most; k is drawn from 2 to `k_most`.
        region_rows: rows of a region, real tokens and masks.
        seed: of the run; k and offset depend on it and on the number of the micro-batch.
        chunk_rows: rows whose logits are in memory at once.
    """

    def __init__(
        self,
        student: Student,
        objective: Online,
        k_most: int,
        region_rows: int,
        seed: int,
        chunk_rows: int = 2048,
    ) -> None:
        super().__init__(student.trained)
        self._student, self._objective = student, objective
        self._k_most, self._region_rows, self._seed = k_most, region_rows, seed
        self._chunk_rows = chunk_rows

    def layout(self, examples: Sequence[Example], number: int) -> RegionLayout:
        """The rows of micro-batch `number`, the same in all its texts."""
        random = np.random.default_rng((self._seed, number))
        k, offset = draw_regions(examples, self._k_most, self._region_rows, random)
        longest = max(len(example) for example in examples)
        regions = regions_over(longest, k, offset, self._region_rows)
        return region_layout(regions, k, offset, self._region_rows)

    def _micro_batch(self, examples: Sequence[Example], number: int) -> Totals:
        layout = self.layout(examples, number)
        tokens = tokens_at(examples, layout.positions)  # [B, S]
        supervised = supervised_rows(examples, layout)  # [B, regions, k]
        rows = mx.array(np.flatnonzero(supervised.reshape(-1)))
        follows = tokens_at(examples, layout.positions[layout.groups] + 1)  # [B, regions, k]
        label = mx.array(follows.reshape(-1)[supervised.reshape(-1)])
        groups = mx.array(layout.groups.reshape(-1))

        def loss() -> LossParts:
            masked = mx.where(mx.array(layout.masked), self._student.attached.vocab_size, mx.array(tokens))
            hidden = self._student.hidden(*self._block(layout, masked))[:, groups]  # [B, regions * k, D]
            arrays = [hidden.reshape(-1, hidden.shape[-1])[rows], label]
            if self._objective.needs_teacher:
                teacher = self._teacher(layout, mx.array(tokens), hidden, groups)
                arrays.append(teacher.reshape(-1, teacher.shape[-1])[rows])
            total = sum_over_chunks(self._rows_loss, self._chunk_rows, *arrays, trained=self._trained)
            return LossParts(total / len(rows))

        return len(rows), *self._loss_and_gradients(loss)

    def _block(self, layout: RegionLayout, ids: mx.array) -> tuple[Block, list[Any]]:
        """The block of a pass over `ids` [B, S], and caches with the visibility of the layout."""
        caches = prefix_caches(self._student.attached.model)
        for _, leaf in cache_leaves(caches):
            leaf.mask = mx.array(layout.visibility())
        return Block(ids=ids, n_real=0, positions=mx.array(layout.positions)), caches

    def _teacher(
        self, layout: RegionLayout, tokens: mx.array, hidden: mx.array, groups: mx.array
    ) -> mx.array:
        """Logits of the teacher with the student's tokens in place of the masks, [B, regions * k, V].

        Args:
            tokens: [B, S] token of the text at every row.
            hidden: [B, regions * k, D] hidden states of the student at the rows that predict.
            groups: [regions * k] the rows that predict.
        """
        batch = len(tokens)
        constant = mx.stop_gradient(hidden).reshape(-1, hidden.shape[-1])
        starts = range(0, len(constant), self._chunk_rows)
        head = self._student.attached.head
        pieces = [self._objective.picks(head(constant[start : start + self._chunk_rows])) for start in starts]
        picks = mx.concatenate(pieces).reshape(-1, layout.k)
        context = student_context(picks[:, 0], picks[:, 1:]).reshape(batch, -1)  # [B, regions * (k - 1)]
        filled = mx.array(tokens)
        filled[:, mx.array(np.flatnonzero(layout.masked))] = context.astype(filled.dtype)
        logits = self._student.teacher_logits(*self._block(layout, filled), groups)
        return mx.stop_gradient(logits)

    def _rows_loss(
        self, hidden: mx.array, label: mx.array, teacher_logits: mx.array | None = None
    ) -> mx.array:
        """Sum of the losses of rows, from hidden states [m, D], labels [m] and logits of the teacher [m, V]."""
        logits = self._student.attached.head(hidden)
        return mx.sum(self._objective.rows_loss(logits, teacher_logits, label))


def supervised_rows(examples: Sequence[Example], layout: RegionLayout) -> np.ndarray:
    """Which rows have a loss, bool [B, regions, k]: those that predict a token of a response."""
    out = []
    for example in examples:
        learns = np.isin(layout.anchors, candidate_anchors(len(example), example.loss_start))
        out.append(learns[:, None] & (layout.positions[layout.groups] + 1 < len(example)))
    return np.array(out)


def tokens_at(examples: Sequence[Example], positions: np.ndarray) -> np.ndarray:
    """Tokens of each example at `positions`, int32 [B, *positions.shape]; 0 behind its end."""
    out = np.zeros((len(examples), *positions.shape), dtype=np.int32)
    for row, example in enumerate(examples):
        inside = positions < len(example)
        out[row][inside] = np.array(example.tokens, dtype=np.int32)[positions[inside]]
    return out
