"""A step of online self-distillation where real rows change too: ordinary LoRA, or a full fine-tune.

One joint pass runs the student over the rows of `region_layout`, real tokens and masks together; another the frozen
teacher over the same rows with the student's own tokens in the masks' places (arXiv 2602.06019, training).
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
from mtp_mlx.model.cache import PrefixCache
from mtp_mlx.train.data import Example
from mtp_mlx.train.loss import LossParts, sum_over_chunks
from mtp_mlx.train.step import MicroBatchRunner, Totals


class Student(ABC):
    """A model and its frozen teacher, both as hidden states of a block of rows.

    Attributes:
        attached: the model.
        trained: the module whose gradients are computed.
    """

    attached: AttachedModel
    trained: nn.Module

    def hidden(self, block: Block, caches: list[Any]) -> mx.array:
        """[B, S, D] of the student; every row is changed by what is trained."""
        return self.attached.forward(block, caches)

    @abstractmethod
    def teacher_logits(self, block: Block, caches: list[Any], rows: mx.array) -> mx.array:
        """[B, rows, V] of the frozen teacher; constants."""


class LowRankStudent(Student):
    """Ordinary LoRA: the student has it on every row, the teacher on none."""

    def __init__(self, attached: AttachedModel) -> None:
        self.attached, self.trained = attached, adapter_of(attached)

    def teacher_logits(self, block: Block, caches: list[Any], rows: mx.array) -> mx.array:
        """See `Student`."""
        closed = replace(block, n_real=block.ids.shape[1])
        return self.attached.head(self.attached.forward(closed, caches)[:, rows])


class WholeStudent(Student):
    """A full fine-tune: the teacher is the weights as they were, put in for its pass."""

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
    """Steps of a student whose real rows change too.

    Args:
        student: what is trained, and its teacher.
        objective: see `Online`.
        k_most: most tokens a region predicts; k is drawn from 2 to it.
        region_rows: rows of a region, real ones and masks.
        seed: of k and offset.
        chunk_rows: rows whose logits exist at once.
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
        """The rows of micro-batch `number`, the same for all its examples."""
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

        def loss() -> mx.array:
            masked = mx.where(mx.array(layout.masked), self._student.attached.vocab_size, mx.array(tokens))
            hidden = self._student.hidden(*self._block(layout, masked))[:, groups]  # [B, regions * k, D]
            arrays = [hidden.reshape(-1, hidden.shape[-1])[rows], label]
            if self._objective.needs_teacher:
                teacher = self._teacher(layout, mx.array(tokens), hidden, groups)
                arrays.append(teacher.reshape(-1, teacher.shape[-1])[rows])
            total = sum_over_chunks(self._rows_loss, self._chunk_rows, *arrays, trained=self._trained)
            return total / len(rows)

        value, gradients = nn.value_and_grad(self._trained, loss)()
        mx.eval(value, gradients)
        return len(rows), LossParts(value, {}), gradients

    def _block(self, layout: RegionLayout, ids: mx.array) -> tuple[Block, list[Any]]:
        """A pass over `ids` [B, S] in the layout, and the caches that carry its visibility."""
        caches = [PrefixCache() for _ in self._student.attached.model.layers]
        for cache in caches:
            cache.mask = mx.array(layout.visibility())
        return Block(ids=ids, n_real=0, positions=mx.array(layout.positions)), caches

    def _teacher(
        self, layout: RegionLayout, tokens: mx.array, hidden: mx.array, groups: mx.array
    ) -> mx.array:
        """[B, regions * k, V] of the teacher where the student's own tokens stand for the masks.

        Args:
            tokens: [B, S] the text at every row.
            hidden: [B, regions * k, D] of the student at the rows that predict.
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
        """Sum over rows of student latents [m, D], labels [m] and teacher logits [m, V]."""
        logits = self._student.attached.head(hidden)
        return mx.sum(self._objective.rows_loss(logits, teacher_logits, label))


def supervised_rows(examples: Sequence[Example], layout: RegionLayout) -> np.ndarray:
    """[B, regions, k] bool: rows of regions inside a response, up to the end of the text."""
    out = []
    for example in examples:
        learns = np.isin(layout.anchors, candidate_anchors(len(example), example.loss_start))
        out.append(learns[:, None] & (layout.positions[layout.groups] + 1 < len(example)))
    return np.array(out)


def tokens_at(examples: Sequence[Example], positions: np.ndarray) -> np.ndarray:
    """[B, *positions.shape] int32 tokens of each example, 0 behind its end."""
    out = np.zeros((len(examples), *positions.shape), dtype=np.int32)
    for row, example in enumerate(examples):
        inside = positions < len(example)
        out[row][inside] = np.array(example.tokens, dtype=np.int32)[positions[inside]]
    return out
