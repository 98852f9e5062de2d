"""The slot rows of a training batch: their positions, what they see, and what they predict.

Every position of a response can be an *anchor*: a real token behind which a *block* of k slots stands
(arXiv 2507.11851, Fig. 4). Real rows and slot rows run in separate passes (design 2.4), so a layout is index
arithmetic in NumPy, without any tensor of the model.

A slot sees its block's earlier slots only, so the first j slots of a block are the same rows with or without those
behind them. Blocks may thus be shorter than k, and more of them are trained with the same number of rows.

Legend: S sequences, T padded length, N blocks per sequence, k slots, R slot rows per sequence, C rows per chunk,
M supervised rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np


@dataclass(frozen=True)
class Part:
    """A slice of a layout: chunks of one sequence, whose slots run forward and backward together (design 2.8).

    Attributes:
        sequence: number of the sequence, below S.
        chunks: its chunks, of the S * chunks of the layout.
        rows: their supervised rows, of the M of the layout.
    """

    sequence: int
    chunks: slice
    rows: slice

    @property
    def count(self) -> int:
        """Number of chunks."""
        return int(self.chunks.stop - self.chunks.start)


@dataclass(frozen=True)
class SlotLayout:
    """Index arrays of one batch.

    The R slot rows of a sequence are its blocks one after another. Chunks hold whole blocks; blocks without
    supervised rows fill them up.

    Attributes:
        tokens: [S, T] int32, right-padded with zeros.
        anchors: [S, N] int32 position of the real token that each block follows.
        lengths: [S, N] int32 rows of each block, including a lead; their sum is R, the same for every sequence.
        slots: k, rows of the longest block, including a lead.
        chunk_rows: C rows that share a row of the slot pass's batch and a copy of the prefix; R is a multiple of it.
        rows: [M] supervised rows, as indices into the S * R slot rows.
        depth: [M] slot j of each supervised row, from 1; 0 for a lead.
        target: [M] the real row that predicts the same token (at anchor + j), as an index into the S * T real rows.
        previous: [M] int32 token at anchor + j: the label before this one, never the input before, a mask.
        label: [M] int32 token at anchor + j + 1.
        lead: 1 if every block starts with a slot 0 at the anchor's own position (see `block_shape`), else 0.
    """

    tokens: np.ndarray
    anchors: np.ndarray
    lengths: np.ndarray
    slots: int
    chunk_rows: int
    rows: np.ndarray
    depth: np.ndarray
    target: np.ndarray
    previous: np.ndarray
    label: np.ndarray
    lead: int = 0

    @property
    def chunks(self) -> int:
        """Chunks per sequence, R / C."""
        return self.block.shape[1] // self.chunk_rows

    @cached_property
    def block(self) -> np.ndarray:
        """Number of every slot row's block in its sequence, int32 [S, R]."""
        return _numbers(self.lengths)

    @cached_property
    def slot(self) -> np.ndarray:
        """Place of every slot row in its block, from 0, a lead included; int32 [S, R]."""
        return _places(self.lengths, self.block)

    def of_block(self, values: np.ndarray) -> np.ndarray:
        """The value of its block for every slot row: [S, N] -> [S, R]."""
        return np.take_along_axis(values, self.block, axis=1)

    def blocks(self, part: Part) -> tuple[np.ndarray, np.ndarray]:
        """(anchors, rows) of all blocks of a slice, int32 [n] each, in the order of the slot rows.

        Blocks that fill a chunk up have the anchor of the block before them.
        """
        numbers, rows = np.unique(self.block.reshape(-1, self.chunk_rows)[part.chunks], return_counts=True)
        return np.maximum.accumulate(self.anchors[part.sequence, numbers]), rows.astype(np.int32)

    def parts(self, most_rows: int | None = None) -> list[Part]:
        """The layout in slices of at most `most_rows` slot rows each, but at least a chunk; None: by sequence.

        No slice has chunks of two sequences, and chunks without supervised rows are in none.
        """
        per_part = self.chunks if most_rows is None else max(1, most_rows // self.chunk_rows)
        parts = []
        for sequence in range(len(self.tokens)):
            end = (sequence + 1) * self.chunks
            for start in range(sequence * self.chunks, end, per_part):
                stop = min(start + per_part, end)
                first, last = np.searchsorted(self.rows, np.array([start, stop]) * self.chunk_rows)
                if last > first:
                    parts.append(Part(sequence, slice(start, stop), slice(int(first), int(last))))
        return parts

    def positions(self) -> np.ndarray:
        """Absolute positions, int32 [S * chunks, C]: slot j behind anchor i has position i + j."""
        positions = self.of_block(self.anchors) + self.slot + 1 - self.lead
        return positions.reshape(-1, self.chunk_rows).astype(np.int32)

    def seen(self, chunks: slice = slice(None)) -> int:
        """Length of the longest prefix that a slot of these chunks sees."""
        return int(self._behind(chunks).max()) + 1

    def _behind(self, chunks: slice) -> np.ndarray:
        """Anchor of every slot row of these chunks, [chunks, C]."""
        return self.of_block(self.anchors).reshape(-1, self.chunk_rows)[chunks]

    def visibility(self, chunks: slice = slice(None)) -> np.ndarray:
        """bool [chunks, C, t + C]: a slot sees the prefix to its anchor, and its block to itself.

        t is `seen(chunks)`: no slot of these chunks sees more of the prefix.
        """
        prefix = (
            np.arange(self.seen(chunks))[None, None] <= self._behind(chunks)[:, :, None]
        )  # [chunks, C, t]
        block = self.block.reshape(-1, self.chunk_rows)[chunks]
        own = (block[:, :, None] == block[:, None]) & np.tri(self.chunk_rows, dtype=bool)
        return np.concatenate([prefix, own], axis=2)


def _numbers(lengths: np.ndarray) -> np.ndarray:
    """[S, N] lengths of blocks -> [S, R] int32 number of every row's block."""
    numbers = np.arange(lengths.shape[1], dtype=np.int32)
    return np.stack([np.repeat(numbers, own) for own in lengths])


def _places(lengths: np.ndarray, block: np.ndarray) -> np.ndarray:
    """[S, N] lengths of blocks and [S, R] number of every row's block -> [S, R] int32 place in its block."""
    start = np.cumsum(lengths, axis=1) - lengths
    return (np.arange(block.shape[1]) - np.take_along_axis(start, block, axis=1)).astype(np.int32)


def candidate_anchors(length: int, loss_start: int) -> np.ndarray:
    """Positions that can be anchors: from the last prompt token to the last one whose slot 1 has a label."""
    return np.arange(max(loss_start - 1, 0), length - 2, dtype=np.int32)


def build_layout(
    sequences: Sequence[Sequence[int]],
    anchors: Sequence[np.ndarray],
    slots: int,
    chunk_blocks: int,
    lead: int = 0,
    lengths: Sequence[np.ndarray] | None = None,
) -> SlotLayout:
    """Lays a batch out.

    Args:
        sequences: S token lists.
        anchors: per sequence, its anchors, ascending; at least one in the batch.
        slots: k, without a lead.
        chunk_blocks: blocks of k slots that a chunk has room for; smaller if the sequences have fewer.
        lead: number of slots at the anchor's own position, at the start of every block: 0 or 1.
        lengths: per sequence, the number of slots behind each anchor, 1 to k, without a lead; None for k.

    Raises:
        ValueError: no sequence has a block.
    """
    if not any(len(row) for row in anchors):
        raise ValueError("no block in this batch: every response is shorter than two tokens")
    if lengths is None:
        lengths = [np.full(len(own), slots) for own in anchors]
    rows_of = [own + lead for own in lengths]
    chunk_rows = min(chunk_blocks * (slots + lead), max(int(own.sum()) for own in rows_of))
    packed = [_pack(*own, chunk_rows) for own in zip(anchors, rows_of, strict=True)]
    padded, sizes, real = _rectangle(packed, chunk_rows, slots + lead)

    length = max(len(sequence) for sequence in sequences)
    tokens = np.zeros((len(sequences), length), dtype=np.int32)
    for index, sequence in enumerate(sequences):
        tokens[index, : len(sequence)] = sequence
    block = _numbers(sizes)
    depth = _places(sizes, block) + 1 - lead  # [S, R]
    target_position = (
        np.take_along_axis(padded, block, axis=1) + depth
    )  # the real row that predicts the same token
    ends = np.array([len(sequence) for sequence in sequences])[:, None]
    supervised = np.take_along_axis(real, block, axis=1) & (target_position + 1 < ends)
    sequence_index, _ = np.nonzero(supervised)
    position = target_position[supervised]
    return SlotLayout(
        tokens=tokens,
        anchors=padded,
        lengths=sizes,
        slots=slots + lead,
        chunk_rows=chunk_rows,
        rows=np.flatnonzero(supervised.reshape(-1)).astype(np.int32),
        depth=depth[supervised].astype(np.int32),
        target=(sequence_index * length + position).astype(np.int32),
        previous=tokens[sequence_index, position],
        label=tokens[sequence_index, position + 1],
        lead=lead,
    )


# A block on its way into a layout: its anchor, its rows, and whether it is one, or fills a chunk up.
_Block = tuple[int, int, bool]


def _pack(anchors: np.ndarray, rows: np.ndarray, chunk_rows: int) -> list[_Block]:
    """Blocks in order, each in one chunk: where one does not fit any more, filling goes before it."""
    packed: list[_Block] = []
    used = 0  # rows of the current chunk
    for anchor, count in zip(anchors.tolist(), rows.tolist(), strict=True):
        if used + count > chunk_rows:
            if used < chunk_rows:
                packed.append((0, chunk_rows - used, False))
            used = 0
        packed.append((anchor, count, True))
        used += count
    return packed


def _rectangle(
    packed: Sequence[list[_Block]], chunk_rows: int, most: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Anchors, rows and realness of blocks, [S, N] each, all sequences filled up to as many rows, whole chunks.

    Args:
        most: rows of a filling block at most.
    """
    counts = [sum(rows for _, rows, _ in blocks) for blocks in packed]
    wanted = -(-max(counts) // chunk_rows) * chunk_rows
    filled = []
    for blocks, count in zip(packed, counts, strict=True):
        missing = wanted - count
        tail: list[_Block] = [(0, missing % most, False)] if missing % most else []
        filled.append(blocks + tail + [(0, most, False)] * (missing // most))
    blocks_most = max(map(len, filled))
    table = np.array([own + [(0, 0, False)] * (blocks_most - len(own)) for own in filled], dtype=np.int32)
    return table[:, :, 0], table[:, :, 1], table[:, :, 2].astype(bool)
