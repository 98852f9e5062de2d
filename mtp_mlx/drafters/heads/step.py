"""A micro-batch of MTP heads: layout -> trunk states and teacher targets -> cascade -> loss and gradients.

The trunk is frozen, so its hidden states and the teacher's targets are constants. The LM head is frozen too: for
each chunk of rows, the gradient with respect to its input is computed right away and the logits are dropped. So the
logits of one chunk at a time are in memory, and none are computed twice.

Legend: S sequences, T padded length, D hidden size, M supervised rows of all depths, Q teacher rows, C columns of
the draft head, V vocabulary.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from mtp_mlx.drafters.heads.draft_heads import DraftHeads, heads_of
from mtp_mlx.drafters.heads.layout import HeadLayout, sliced_layouts
from mtp_mlx.drafters.heads.loss import MTPDistil, TeacherTop
from mtp_mlx.drafters.heads.teacher import teacher_targets
from mtp_mlx.drafters.heads.trunk_states import TrunkStates, last_state, read_states
from mtp_mlx.model.attach import AttachedModel
from mtp_mlx.train.data import Example
from mtp_mlx.train.draft_vocabulary import draft_columns
from mtp_mlx.train.loss import LossParts
from mtp_mlx.train.plan import WHOLE, StepPlan
from mtp_mlx.train.step import MicroBatchRunner, Totals, added

MOST_CHUNK = (
    512  # rows per chunk of the loss: on a CPU larger chunks are slower, since they do not fit its caches
)


@dataclass(frozen=True)
class HeadRows:
    """The supervised rows of a slice, depth by depth.

    Attributes:
        target: [M] teacher row.
        label: [M] column of the token that followed, -1 if it is outside the draft vocabulary.
        weight: [M] float32; the sum over the micro-batch is 1 if every depth has rows.
        counts: {depth: number of rows}, for the depths that have rows.
        totals: the same of the whole micro-batch.
    """

    target: mx.array
    label: mx.array
    weight: mx.array
    counts: dict[int, int]
    totals: Mapping[int, int]


def head_rows(
    layout: HeadLayout,
    columns: np.ndarray,
    distil: MTPDistil,
    depths: Sequence[int],
    totals: Mapping[int, int] | None = None,
) -> HeadRows:
    """The rows of a layout; the weight of each depth is spread evenly over its rows in the micro-batch.

    Args:
        columns: [V] as `draft_columns` gives them.
        depths: all trained depths; with short responses, some may have no rows.
        totals: {depth: rows of the micro-batch}; None if the layout is all of it.
    """
    shares = dict(zip(depths, distil.head_weights(depths), strict=True))
    counts = layout.counts
    totals = counts if totals is None else totals
    weight = [np.full(count, shares[depth] / totals[depth], np.float32) for depth, count in counts.items()]
    target = np.concatenate(layout.targets)
    return HeadRows(
        target=mx.array(target),
        label=mx.array(columns[layout.label][target]),
        weight=mx.array(np.concatenate(weight)),
        counts=counts,
        totals=totals,
    )


def supervised_rows(
    attached: AttachedModel, embeddings: mx.array, states: mx.array, layout: HeadLayout
) -> mx.array:
    """Inputs of the LM head at the supervised rows, depth by depth, [M, D]; differentiable in the heads.

    Args:
        attached: the model with the heads.
        embeddings: [S, T, D] of the tokens.
        states: [S, T, (n + 1) * D] that the heads read.
    """
    tokens = mx.array(layout.tokens)
    found = heads_of(attached).over_text(attached, tokens, embeddings, states, layout.depths[-1])
    pieces = [
        found[depth - 1].reshape(-1, embeddings.shape[-1])[mx.array(rows)]
        for depth, rows in zip(layout.depths, layout.rows, strict=True)
    ]
    return mx.concatenate(pieces)


def chunked_loss(
    attached: AttachedModel,
    distil: MTPDistil,
    states: mx.array,
    rows: HeadRows,
    teacher: TeacherTop | None,
    chunk_rows: int,
) -> tuple[mx.array, dict[str, mx.array]]:
    """(a scalar whose gradient with respect to `states` is that of the loss, parts of the loss per row).

    The scalar's value has no meaning. The parts, float32 [M] each, carry no gradient.

    Args:
        states: [M, D] from `supervised_rows`.
        chunk_rows: rows whose logits are in memory at once.
    """
    dtype = attached.embed(mx.zeros((1,), dtype=mx.int32)).dtype
    constants = mx.stop_gradient(states)
    gradients: list[mx.array] = []
    found: list[dict[str, mx.array]] = []
    heads = heads_of(attached)
    for depth, own in _chunks(heads, rows, chunk_rows):
        of_rows = None if teacher is None else teacher.rows(rows.target[own])

        def loss(
            z: mx.array, depth: int = depth, own: slice = own, of_rows: TeacherTop | None = of_rows
        ) -> tuple:
            logits = heads.logits(attached, z.astype(dtype), depth)
            parts = distil.rows_parts(logits, of_rows, rows.label[own])
            return mx.sum(rows.weight[own] * distil.total(parts)), parts

        z = constants[own]
        if gradients:  # MLX evaluates in no particular order; without this, many chunks at once
            (z,) = mx.depends([z], [gradients[-1]])
        (_, parts), gradient = mx.value_and_grad(loss)(z)
        gradients.append(gradient)
        found.append(dict(zip(parts, mx.depends(list(parts.values()), [gradient]), strict=True)))
    surrogate = mx.sum(states * mx.stop_gradient(mx.concatenate(gradients)))
    return surrogate, {name: mx.concatenate([piece[name] for piece in found]) for name in found[0]}


def _chunks(heads: DraftHeads, rows: HeadRows, chunk_rows: int) -> list[tuple[int, slice]]:
    """(a depth that has their LM head, rows) of each chunk; of one depth only, if each head has its own LM head."""
    counts = rows.counts if heads.owns_lm_heads else {1: sum(rows.counts.values())}
    found, first = [], 0
    for depth, count in counts.items():
        last = first + count
        found += [
            (depth, slice(start, min(start + chunk_rows, last))) for start in range(first, last, chunk_rows)
        ]
        first = last
    return found


def summary(distil: MTPDistil, rows: HeadRows, parts: dict[str, mx.array]) -> LossParts:
    """A slice's share of the loss, of the means of "ce" and "kl", and of each head's loss ("head 1", ...)."""
    means = {name: mx.sum(rows.weight * part) for name, part in parts.items()}
    each = distil.total(parts)
    per_head, start = {}, 0
    for depth, count in rows.counts.items():
        per_head[f"head {depth}"] = mx.sum(each[start : start + count]) / rows.totals[depth]
        start += count
    return LossParts(distil.total(means), {**means, **per_head})


class HeadsRunner(MicroBatchRunner):
    """Steps of MTP heads.

    Args:
        attached: a frozen model with heads, of which those to train are not frozen.
        distil: the loss.
        depths: the trained depths.
        seed: of the run.
        states: source of the trunk's hidden states.
        share: fraction of the positions that are trained.
        chunk_rows: rows whose logits are in memory at once.
        plan: slices and threads; sequences are never cut.
    """

    def __init__(
        self,
        attached: AttachedModel,
        distil: MTPDistil,
        depths: Sequence[int],
        seed: int,
        states: TrunkStates,
        share: float = 1.0,
        chunk_rows: int = 2048,
        plan: StepPlan = WHOLE,
    ) -> None:
        heads = heads_of(attached)
        super().__init__(heads, plan.workers)
        self._heads, self._slice_rows = heads, plan.slice_rows
        self._attached, self._distil, self._depths = attached, distil, list(depths)
        self._seed, self._share, self._chunk_rows = seed, share, min(chunk_rows, MOST_CHUNK)
        self._columns, self._states = draft_columns(attached), states
        if plan.workers > 1:
            self._evaluate_constants()

    def _evaluate_constants(self) -> None:
        """Evaluates every array that a step reads: a lazy array belongs to the thread that made it."""
        tokens = mx.zeros((1, self._depths[-1] + 2), dtype=mx.int32)
        attached, states = self._attached, self._attached.states_to_train_on(tokens)
        read, hidden = read_states(attached, states), last_state(attached, states)
        found = self._heads.over_text(attached, tokens, attached.embed(tokens), read, self._depths[-1])
        logits = [self._heads.logits(attached, hidden, depth) for depth in self._depths]
        mx.eval(self._heads.parameters(), found, logits, attached.draft_head(hidden), attached.head(hidden))

    def _micro_batch(self, examples: Sequence[Example], number: int) -> Totals:
        """See `MicroBatchRunner`."""
        random = np.random.default_rng((self._seed, number))
        slices = sliced_layouts(examples, self._depths, self._share, random, self._slice_rows)
        totals: Counter[int] = Counter()
        for _, layout in slices:
            totals.update(layout.counts)
        total: tuple[LossParts, dict] | None = None
        for own, layout in slices:
            found = self._slice(own, layout, totals)
            total = found if total is None else added(total, found)
        assert total is not None
        return sum(totals.values()), *total

    def _slice(
        self, examples: Sequence[Example], layout: HeadLayout, totals: Mapping[int, int]
    ) -> tuple[LossParts, dict]:
        """Loss and gradients of a slice, as its share of the micro-batch; evaluated."""
        attached, distil = self._attached, self._distil
        states, normaliser = self._states.with_normaliser(examples)
        embeddings = attached.embed(mx.array(layout.tokens))
        mx.eval(states, embeddings)
        teacher = teacher_targets(attached, last_state(attached, states), layout, distil, normaliser)
        rows = head_rows(layout, self._columns, distil, self._depths, totals)

        def loss() -> LossParts:
            read = read_states(attached, states)
            found = supervised_rows(attached, embeddings.astype(mx.float32), read.astype(mx.float32), layout)
            return LossParts(*chunked_loss(attached, distil, found, rows, teacher, self._chunk_rows))

        per_row, gradients = self._loss_and_gradients(loss)
        parts = summary(distil, rows, per_row.parts)
        mx.eval(parts.total, parts.parts)
        return parts, gradients
