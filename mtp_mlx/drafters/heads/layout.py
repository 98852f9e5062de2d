"""Which rows of a cascade of MTP heads a training batch supervises, and which main rows teach them.

Head k at position i predicts token i + k + 1; the trunk's row i + k predicts the same token and is its teacher. A
row is supervised where that token lies in the response. Index arithmetic in numpy; no tensors of the model.

Legend: S sequences, T padded length, K depths, M_k supervised rows of depth k, Q teacher rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mtp_mlx.drafters.heads.trunk_states import padded
from mtp_mlx.train.data import Example


@dataclass(frozen=True)
class HeadLayout:
    """Index arrays of one batch.

    Attributes:
        tokens: [S, T] int32, right-padded with zeros.
        depths: the supervised depths that have rows, rising from 1.
        rows: per depth in `depths`, [M_k] index into the S * (T - k) rows of that head.
        targets: per depth in `depths`, [M_k] index into `teacher_rows`.
        teacher_rows: [Q] index into the S * T rows of the trunk.
        label: [Q] int32 the token after each teacher row.
    """

    tokens: np.ndarray
    depths: list[int]
    rows: list[np.ndarray]
    targets: list[np.ndarray]
    teacher_rows: np.ndarray
    label: np.ndarray

    @property
    def count(self) -> int:
        """Supervised rows of all depths."""
        return sum(len(rows) for rows in self.rows)


def first_position(loss_start: int, depth: int) -> int:
    """The first position whose head `depth` predicts a token of the response."""
    return max(0, loss_start - depth - 1)


def can_supervise(example: Example, depths: Sequence[int]) -> bool:
    """Whether some head has a token of the response to predict."""
    return any(first_position(example.loss_start, depth) + depth + 1 < len(example) for depth in depths)


def build_head_layout(
    examples: Sequence[Example],
    depths: Sequence[int],
    share: float = 1.0,
    random: np.random.Generator | None = None,
) -> HeadLayout:
    """Lays a batch out.

    Args:
        depths: which depths are supervised, rising.
        share: share of each sequence's positions that are supervised, (0, 1]; drawn from `random` below 1.
        random: needed where share is below 1.

    Raises:
        ValueError: no row is supervised.
    """
    tokens = padded(examples)
    length = tokens.shape[1]
    chosen = [_positions(example, depths, share, random) for example in examples]
    found: dict[int, tuple[np.ndarray, np.ndarray]] = {}
    for depth in depths:
        rows, teachers = [], []
        for index, (example, positions) in enumerate(zip(examples, chosen, strict=True)):
            first = first_position(example.loss_start, depth)
            own = positions[(positions >= first) & (positions + depth + 1 < len(example))]
            rows.append(index * (length - depth) + own)
            teachers.append(index * length + own + depth)
        if sum(len(own) for own in rows):
            found[depth] = np.concatenate(rows), np.concatenate(teachers)
    if not found:
        raise ValueError("no supervised row in this batch: its responses are too short")
    teacher_rows = np.unique(np.concatenate([teachers for _, teachers in found.values()]))
    return HeadLayout(
        tokens=tokens,
        depths=list(found),
        rows=[rows.astype(np.int32) for rows, _ in found.values()],
        targets=[np.searchsorted(teacher_rows, teachers).astype(np.int32) for _, teachers in found.values()],
        teacher_rows=teacher_rows.astype(np.int32),
        label=tokens.reshape(-1)[teacher_rows + 1],
    )


def _positions(
    example: Example, depths: Sequence[int], share: float, random: np.random.Generator | None
) -> np.ndarray:
    """Positions of an example at which heads are supervised, rising."""
    first = min(first_position(example.loss_start, depth) for depth in depths)
    candidates = np.arange(first, len(example) - 1 - min(depths))
    if share >= 1 or not len(candidates):
        return candidates
    if random is None:
        raise ValueError("a share of the positions is drawn at random: give a generator")
    return np.sort(random.permutation(candidates)[: int(np.ceil(share * len(candidates)))])
