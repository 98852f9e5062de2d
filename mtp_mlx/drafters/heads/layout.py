"""The supervised rows of a cascade of MTP heads in a training batch, and the rows that teach them.

Head k at position i predicts token i + k + 1. The trunk's row i + k predicts the same token and is its teacher. A row
is supervised if that token is in the response. A layout is index arithmetic in NumPy, without tensors of the model.

Legend: S sequences, T padded length, M_k supervised rows of depth k, Q teacher rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mtp_mlx.train.data import Example


def padded(examples: Sequence[Example]) -> np.ndarray:
    """Tokens of the examples, right-padded with zeros, int32 [S, T]."""
    tokens = np.zeros((len(examples), max(len(example) for example in examples)), dtype=np.int32)
    for row, example in zip(tokens, examples, strict=True):
        row[: len(example)] = example.tokens
    return tokens


@dataclass(frozen=True)
class HeadLayout:
    """Index arrays of one batch.

    Attributes:
        tokens: [S, T] int32, right-padded with zeros.
        depths: the depths that have supervised rows, ascending.
        rows: per depth, [M_k] indices into the S * (T - k) rows of that head.
        targets: per depth, [M_k] indices into `teacher_rows`.
        teacher_rows: [Q] indices into the S * T rows of the trunk.
        label: [Q] int32 token after each teacher row.
    """

    tokens: np.ndarray
    depths: list[int]
    rows: list[np.ndarray]
    targets: list[np.ndarray]
    teacher_rows: np.ndarray
    label: np.ndarray

    @property
    def counts(self) -> dict[int, int]:
        """{depth: number of supervised rows}, for the depths that have some."""
        return {depth: len(rows) for depth, rows in zip(self.depths, self.rows, strict=True)}

    @property
    def count(self) -> int:
        """Number of supervised rows of all depths."""
        return sum(len(rows) for rows in self.rows)


def first_position(loss_start: int, depth: int) -> int:
    """The first position at which head `depth` predicts a token of the response."""
    return max(0, loss_start - depth - 1)


def can_supervise(example: Example, depths: Sequence[int]) -> bool:
    """Whether a head at one of `depths` has a token of the response to predict."""
    return any(first_position(example.loss_start, depth) + depth + 1 < len(example) for depth in depths)


def build_head_layout(
    examples: Sequence[Example],
    depths: Sequence[int],
    share: float = 1.0,
    random: np.random.Generator | None = None,
) -> HeadLayout:
    """Lays a batch out.

    Args:
        depths: the depths to supervise, ascending.
        share: fraction of each sequence's positions that are supervised, (0, 1].
        random: draws the positions if `share` is below 1.

    Raises:
        ValueError: no row is supervised.
    """
    return lay_out(examples, depths, [_positions(example, depths, share, random) for example in examples])


def sliced_layouts(
    examples: Sequence[Example],
    depths: Sequence[int],
    share: float,
    random: np.random.Generator,
    most_rows: int | None,
) -> list[tuple[Sequence[Example], HeadLayout]]:
    """(examples, layout) of slices of a batch, which together supervise the rows of `build_head_layout`.

    Args:
        most_rows: rows of a slice at most, padding included, but at least a sequence; None for the whole batch.

    Raises:
        ValueError: no row is supervised.
    """
    chosen = [_positions(example, depths, share, random) for example in examples]
    longest = max(len(example) for example in examples)
    count = len(examples) if most_rows is None else max(1, most_rows // longest)
    slices = []
    for start in range(0, len(examples), count):
        own, positions = examples[start : start + count], chosen[start : start + count]
        if any(
            _supervised(*pair, depth).size for pair in zip(own, positions, strict=True) for depth in depths
        ):
            slices.append((own, lay_out(own, depths, positions)))
    if not slices:
        raise ValueError("no supervised row in this batch: its responses are too short")
    return slices


def _supervised(example: Example, positions: np.ndarray, depth: int) -> np.ndarray:
    """Those of `positions` at which head `depth` predicts a token of the response."""
    first = first_position(example.loss_start, depth)
    return positions[(positions >= first) & (positions + depth + 1 < len(example))]


def lay_out(examples: Sequence[Example], depths: Sequence[int], chosen: Sequence[np.ndarray]) -> HeadLayout:
    """The layout of a batch whose sequences are supervised at the positions `chosen`.

    Raises:
        ValueError: no row is supervised.
    """
    tokens = padded(examples)
    length = tokens.shape[1]
    found: dict[int, tuple[np.ndarray, np.ndarray]] = {}
    for depth in depths:
        rows, teachers = [], []
        for index, (example, positions) in enumerate(zip(examples, chosen, strict=True)):
            own = _supervised(example, positions, depth)
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
    """Supervised positions of an example, ascending."""
    first = min(first_position(example.loss_start, depth) for depth in depths)
    candidates = np.arange(first, len(example) - 1 - min(depths))
    if share >= 1 or not len(candidates):
        return candidates
    if random is None:
        raise ValueError("`share` is below 1, and there is no `random` to draw the positions")
    return np.sort(random.permutation(candidates)[: int(np.ceil(share * len(candidates)))])
