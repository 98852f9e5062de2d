"""The slot rows of a training batch: their positions, what they see, and what they predict.

Every position of a response can be an *anchor*: a real token behind which a *block* of k slots stands
(arXiv 2507.11851, Fig. 4). Real rows and slot rows run in separate passes (design 2.4), so a layout is index
arithmetic in NumPy, without any tensor of the model.

Legend: S sequences, T padded length, N blocks per sequence, k slots, G blocks per chunk, M supervised rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

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

    Attributes:
        tokens: [S, T] int32, right-padded with zeros.
        anchors: [S, N] int32 position of the real token that each block follows; N is a multiple of G.
        slots: k, rows of a block, including a lead.
        chunk_blocks: G blocks that share a row of the slot pass's batch and a copy of the prefix.
        rows: [M] supervised rows, as indices into the S * N * k slot rows.
        depth: [M] slot j of each supervised row, from 1; 0 for a lead.
        target: [M] the real row that predicts the same token (at anchor + j), as an index into the S * T real rows.
        previous: [M] int32 token at anchor + j: the label before this one, never the input before, a mask.
        label: [M] int32 token at anchor + j + 1.
        lead: 1 if every block starts with a slot 0 at the anchor's own position (see `block_shape`), else 0.
    """

    tokens: np.ndarray
    anchors: np.ndarray
    slots: int
    chunk_blocks: int
    rows: np.ndarray
    depth: np.ndarray
    target: np.ndarray
    previous: np.ndarray
    label: np.ndarray
    lead: int = 0

    @property
    def chunks(self) -> int:
        """Chunks per sequence, N / G."""
        return self.anchors.shape[1] // self.chunk_blocks

    @property
    def chunk_rows(self) -> int:
        """Slot rows of a chunk, G * k."""
        return self.chunk_blocks * self.slots

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
        """Absolute positions, int32 [S * chunks, G * k]: slot j behind anchor i has position i + j."""
        offsets = np.arange(self.slots, dtype=np.int32) + 1 - self.lead
        positions = self.anchors[:, :, None] + offsets
        return positions.reshape(-1, self.chunk_blocks * self.slots).astype(np.int32)

    def seen(self, chunks: slice = slice(None)) -> int:
        """Length of the longest prefix that a slot of these chunks sees."""
        return int(self.anchors.reshape(-1, self.chunk_blocks)[chunks].max()) + 1

    def visibility(self, chunks: slice = slice(None)) -> np.ndarray:
        """bool [chunks, G * k, t + G * k]: a slot sees the prefix to its anchor, and its block to itself.

        t is `seen(chunks)`: no slot of these chunks sees more of the prefix.
        """
        length = self.seen(chunks)
        anchors = self.anchors.reshape(-1, self.chunk_blocks)[chunks]
        prefix = np.arange(length)[None, None] <= anchors[:, :, None]  # [chunks, G, t]
        prefix = np.repeat(prefix, self.slots, axis=1)
        causal = np.tril(np.ones((self.slots, self.slots), dtype=bool))
        own = np.kron(np.eye(self.chunk_blocks, dtype=bool), causal)  # [G * k, G * k]
        return np.concatenate([prefix, np.broadcast_to(own, (len(anchors), *own.shape))], axis=2)


def candidate_anchors(length: int, loss_start: int) -> np.ndarray:
    """Positions that can be anchors: from the last prompt token to the last one whose slot 1 has a label."""
    return np.arange(max(loss_start - 1, 0), length - 2, dtype=np.int32)


def build_layout(
    sequences: Sequence[Sequence[int]],
    anchors: Sequence[np.ndarray],
    slots: int,
    chunk_blocks: int,
    lead: int = 0,
) -> SlotLayout:
    """Lays a batch out.

    Args:
        sequences: S token lists.
        anchors: per sequence, its anchors, ascending; at least one in the batch.
        slots: k, without a lead.
        chunk_blocks: G; smaller if the sequences have fewer blocks.
        lead: number of slots at the anchor's own position, at the start of every block: 0 or 1.

    Raises:
        ValueError: no sequence has a block.
    """
    most = max((len(row) for row in anchors), default=0)
    if most == 0:
        raise ValueError("no block in this batch: every response is shorter than two tokens")
    chunk_blocks = min(chunk_blocks, most)
    count = -(-most // chunk_blocks) * chunk_blocks
    length = max(len(sequence) for sequence in sequences)
    tokens = np.zeros((len(sequences), length), dtype=np.int32)
    padded = np.zeros((len(sequences), count), dtype=np.int32)
    real = np.zeros((len(sequences), count), dtype=bool)
    for index, (sequence, own) in enumerate(zip(sequences, anchors, strict=True)):
        tokens[index, : len(sequence)] = sequence
        padded[index, : len(own)] = own
        real[index, : len(own)] = True
    lengths = np.array([len(sequence) for sequence in sequences])
    slot = np.arange(1 - lead, slots + 1)
    target_position = padded[:, :, None] + slot  # [S, N, k], the real row that predicts the same token
    supervised = real[:, :, None] & (target_position + 1 < lengths[:, None, None])
    sequence_index, _, depth = np.nonzero(supervised)
    position = target_position[supervised]
    return SlotLayout(
        tokens=tokens,
        anchors=padded,
        slots=slots + lead,
        chunk_blocks=chunk_blocks,
        rows=np.flatnonzero(supervised.reshape(-1)).astype(np.int32),
        depth=(depth + 1 - lead).astype(np.int32),
        target=(sequence_index * length + position).astype(np.int32),
        previous=tokens[sequence_index, position],
        label=tokens[sequence_index, position + 1],
        lead=lead,
    )
