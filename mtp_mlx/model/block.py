"""The rows of one forward pass: their order, positions and visibility.

A block has real rows first (the pending token, then the drafts to verify) and slot rows after them. The order in
memory is free, because positions and visibility are explicit; with real rows first, the keys and values of accepted
tokens are a prefix, so roll-back is one trim.

Legend: R rows of the block, d drafts, k slots of a group.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import mlx.core as mx
import numpy as np


@dataclass(frozen=True)
class BlockShape:
    """The part of a block that depends only on its layout, computed once per layout.

    Attributes:
        n_real: number of real rows, including the pending token.
        offsets: [R] int32, position of each row relative to the pending token.
        visibility: [R, R] bool, `visibility[i, j]` if row i sees row j; every row sees itself.
        slot_index: [R - n_real] int32, index (from 0) of each slot row's embedding.
        group_start: for every real row, the first row of the slot group after it.
        lead: slot rows at the start of every group that draft nothing.
        contiguous: positions are consecutive and visibility is causal, so a scalar offset and a "causal" mask suffice
            and MLX's fast paths apply.
        paths: for every real row, the real rows that it sees, itself last; empty if they are a chain.
    """

    n_real: int
    offsets: np.ndarray
    visibility: np.ndarray
    slot_index: np.ndarray
    group_start: tuple[int, ...]
    contiguous: bool
    lead: int = 0
    paths: tuple[tuple[int, ...], ...] = ()

    @property
    def rows(self) -> int:
        """Number of rows R."""
        return len(self.offsets)


@lru_cache(maxsize=512)
def block_shape(
    drafts: int, slots: tuple[int, ...], lead: int = 0, parents: tuple[int, ...] = ()
) -> BlockShape:
    """The rows of a block with `drafts` drafts and `slots[r]` slots after real row r.

    A draft has the offset of its parent plus 1, and sees its ancestors and itself. Slot j (from 1) of the group after
    a row of offset a predicts the token at offset a + j + 1 and has offset a + j (arXiv 2507.11851, Fig. 4: mask j
    after token i has position i + j). It sees what that row sees and slots 1..j of its own group.

    With `lead` = 1, every group that is not empty starts with one more slot, slot 0 at offset a: it has the position
    of the last accepted token and tells later slots what they must know about the token at offset a + 1 (arXiv
    2512.21323, where the slot of the token at offset n has position n - 1).

    Args:
        parents: [drafts] index of each draft's parent, -1 for the pending token; empty for a chain.

    Raises:
        ValueError: if `slots` does not have one entry for each real row.
    """
    if len(slots) != drafts + 1:
        raise ValueError(f"{drafts} drafts need {drafts + 1} slot groups, got {len(slots)}")
    n_real = drafts + 1
    counts = [count + lead if count else 0 for count in slots]
    rows = n_real + sum(counts)
    offsets = np.zeros(rows, dtype=np.int32)
    visibility = np.zeros((rows, rows), dtype=bool)
    visibility[0, 0] = True
    for draft, parent in enumerate(parents or range(-1, drafts - 1), start=1):
        offsets[draft] = offsets[parent + 1] + 1
        visibility[draft] = visibility[parent + 1]
        visibility[draft, draft] = True
    slot_index = np.zeros(rows - n_real, dtype=np.int32)
    group_start = []
    row = n_real
    for real, count in enumerate(counts):
        group_start.append(row)
        group = slice(row, row + count)
        offsets[group] = offsets[real] + 1 - lead + np.arange(count)
        visibility[group, :n_real] = visibility[real, :n_real]
        visibility[group, group] = np.tril(np.ones((count, count), dtype=bool))
        slot_index[row - n_real : row - n_real + count] = np.arange(count)
        row += count
    causal = np.array_equal(visibility, np.tril(np.ones((rows, rows), dtype=bool)))
    contiguous = causal and np.array_equal(offsets, np.arange(rows))
    seen = visibility[: n_real if parents else 0, :n_real]
    paths = tuple(tuple(np.flatnonzero(row).tolist()) for row in seen)  # an ancestor comes before its draft
    return BlockShape(n_real, offsets, visibility, slot_index, tuple(group_start), contiguous, lead, paths)


@dataclass(frozen=True)
class Block:
    """One forward pass over rows of a single sequence, or of a batch with equal layouts.

    Attributes:
        ids: [B, R] int32; ids >= the vocabulary size are slots (`vocab_size + slot_index`).
        n_real: number of real rows, which come first; the other rows are slots, where gated LoRA acts.
        positions: [R] or [B, R] int32 absolute positions; None if they continue those in the cache.
        visibility: [R, R] bool among the block's rows; None if causal.
        paths: as in `BlockShape`.
        uniforms: [R - n_real] or [B, R - n_real] float32 in [0, 1), the uniform given to each slot row (Parallel
            Token Prediction), -1 for none; None if slots take none.
        is_step: whether this is a decoding step, whose real rows plain decoding would compute one by one.
    """

    ids: mx.array
    n_real: int
    positions: mx.array | None = None
    visibility: mx.array | None = None
    uniforms: mx.array | None = None
    is_step: bool = False
    paths: tuple[tuple[int, ...], ...] = ()

    @staticmethod
    def real(ids: mx.array) -> Block:
        """An ordinary forward pass: only real rows, contiguous and causal. ids: [B, R]."""
        return Block(ids=ids, n_real=ids.shape[1])

    @staticmethod
    def decode(tokens: mx.array, shape: BlockShape, start: int, vocab_size: int) -> Block:
        """A decoding step.

        Args:
            tokens: [n_real] int32, the pending token and the drafts to verify.
            shape: the layout's rows.
            start: absolute position of the pending token (= number of cached tokens).
            vocab_size: first slot id.
        """
        slot_ids = mx.array(shape.slot_index + vocab_size)
        ids = mx.concatenate([tokens.astype(mx.int32), slot_ids])[None]  # [1, R]
        if shape.contiguous:
            return Block(ids=ids, n_real=shape.n_real, is_step=True)
        return Block(
            ids=ids,
            n_real=shape.n_real,
            positions=mx.array(shape.offsets + start),
            visibility=mx.array(shape.visibility),
            is_step=True,
            paths=shape.paths,
        )
