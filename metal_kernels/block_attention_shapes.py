"""How the rows and keys of a block's attention are divided among threadgroups: arithmetic on shapes, no arrays."""

from __future__ import annotations

from typing import NamedTuple

import mlx.core as mx

HEAD_SIZES = (64, 80, 96, 128, 256)
MAX_ROWS = 32  # a row's visibility has one bit for each
MAX_CHUNKS = 128  # what the merge pass can hold
TILE = 32  # keys processed at a time
FILL = 128  # number of threadgroups that keeps a large GPU busy
MIN_CHUNK = 256  # smallest chunk in keys: below this, starting a chunk costs more than its keys
THREADGROUP_BYTES = 32768

# (simdgroups, packed rows per simdgroup); only a few, because each is compiled separately.
_LAYOUTS = ((4, 1), (4, 2), (4, 4), (4, 8), (8, 8))


class Tiling(NamedTuple):
    """How the packed rows of a key head are divided: `parts` threadgroups of `groups` simdgroups of `rows` rows."""

    groups: int
    rows: int
    parts: int


def _threadgroup_bytes(groups: int, rows: int, head_size: int, itemsize: int) -> int:
    """Threadgroup memory of the first pass: queries, the slab of keys or values, weights."""
    columns = head_size if head_size <= 96 else 64
    return itemsize * (groups * rows * head_size + TILE * (columns + 4)) + 4 * groups * rows * TILE


def packed_limit(head_size: int, dtype: mx.Dtype) -> int:
    """Most packed rows (query heads per key head, times R) for which keys and values are read only once.

    64 for 16-bit types up to head size 128; 32 for head size 256 and for float32; 16 for float32 with 256.
    """
    fits = [
        groups * rows
        for groups, rows in _LAYOUTS
        if _threadgroup_bytes(groups, rows, head_size, dtype.size) <= THREADGROUP_BYTES
    ]
    return max(fits)


def tiling(packed: int, head_size: int, dtype: mx.Dtype) -> Tiling:
    """The tiling with the fewest parts that the limit allows, in the smallest layout that holds their rows."""
    parts = -(-packed // packed_limit(head_size, dtype))
    share = -(-packed // parts)
    groups, rows = next(layout for layout in _LAYOUTS if layout[0] * layout[1] >= share)
    return Tiling(groups, rows, parts)


def chunk_keys(length: int, key_heads: int, packed: int, parts: int, itemsize: int) -> int:
    """Keys per chunk, a multiple of 32; `length` or more for a single chunk.

    Enough chunks to keep the GPU busy, but none so short that its partial results (8 bytes per row and column,
    written and read again) exceed an eighth of its keys and values (`itemsize` bytes per element). That is at least
    16 keys per packed row with 16 bits, and 32 with 8 bits.
    """
    wanted = max(1, FILL // (key_heads * parts))
    chunk = max(-(-length // wanted), MIN_CHUNK, 32 * packed // itemsize)
    return -(-chunk // TILE) * TILE
