"""The regions of online self-distillation in a text (arXiv 2602.06019).

A region is P real tokens followed by k - 1 masks; its last real row and its masks predict k tokens. Regions follow
one another, and the tokens that a region's masks stand for come again as the real tokens of the next region, so
their positions occur twice. `offset` shifts all regions to the left: the first one has that many fewer real tokens,
and as many follow the last one.

    3 regions, k 3, 6 rows a region, offset 0      pos   0 1 2 3 M4 M5 | 4 5 6 7 M8 M9 | 8 9 10 11 M12 M13
    the same with offset 2                         pos   0 1 M2 M3 | 2 3 4 5 M6 M7 | 6 7 8 9 M10 M11 | 10 11

The real rows of all regions are the text itself, each token once. So a layout of regions is also a layout of slots
behind anchors, the last real tokens of the regions. Gated LoRA is trained that way, without a second copy of tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mtp_mlx.drafters.slots.layout import candidate_anchors
from mtp_mlx.train.data import Example


@dataclass(frozen=True)
class RegionLayout:
    """The S rows of a sequence.

    Attributes:
        positions: [S] int32 position of each row in the text.
        masked: [S] bool, rows whose input is the mask.
        predicts: [S] bool, the last real row and the masks of each region.
        region: [S] int32 region of each row.
        k: tokens that a region predicts.
    """

    positions: np.ndarray
    masked: np.ndarray
    predicts: np.ndarray
    region: np.ndarray
    k: int

    @property
    def groups(self) -> np.ndarray:
        """Rows that predict, region by region, [regions, k]."""
        return np.flatnonzero(self.predicts).reshape(-1, self.k)

    @property
    def anchors(self) -> np.ndarray:
        """Position of the last real token of each region, [regions]."""
        return self.positions[self.groups[:, 0]]

    def visibility(self) -> np.ndarray:
        """bool [S, S]: a row sees the real rows up to itself, and a mask the masks of its region up to itself."""
        earlier = np.tril(np.ones((len(self.positions),) * 2, dtype=bool))
        own_mask = self.masked[None] & (self.region[:, None] == self.region[None]) & self.masked[:, None]
        return earlier & (~self.masked[None] | own_mask)


def real_tokens(k: int, region_rows: int) -> int:
    """P, the number of real tokens of a region.

    Raises:
        ValueError: the region has no room for a real token.
    """
    if region_rows < k or k < 1:
        raise ValueError(f"a region of {region_rows} rows has no room for {k - 1} masks and a real token")
    return region_rows - (k - 1)


def region_layout(regions: int, k: int, offset: int, region_rows: int) -> RegionLayout:
    """Rows of `regions` regions of `region_rows` rows each.

    Args:
        k: tokens that a region predicts, with k - 1 masks.
        offset: shift to the left, 0 <= offset < P.

    Raises:
        ValueError: a region has no room for a real token, or the offset is not below P.
    """
    real = real_tokens(k, region_rows)
    if not 0 <= offset < real:
        raise ValueError(f"offset is {offset}, it must be below the {real} real tokens of a region")
    row = np.arange(offset, offset + regions * region_rows)  # counted without an offset
    region, within = np.divmod(row, region_rows)
    return RegionLayout(
        positions=(region * real + within - offset).astype(np.int32),
        masked=within >= real,
        predicts=(within >= real - 1) & (region < regions),
        region=region.astype(np.int32),
        k=k,
    )


def regions_over(length: int, k: int, offset: int, region_rows: int) -> int:
    """Number of regions such that the last anchor is at the end of the text or behind it."""
    return -(-(length + offset) // real_tokens(k, region_rows))


def region_anchors(length: int, loss_start: int, k: int, offset: int, region_rows: int) -> np.ndarray:
    """Anchors of the regions that are trained: those whose first mask predicts a token of the response.

    Regions whose masks are all behind the end of the text are left out, as in the paper. So are regions inside a
    prompt, which the paper keeps.
    """
    real = real_tokens(k, region_rows)
    anchors = np.arange(real - 1 - offset, length, real, dtype=np.int32)
    return anchors[np.isin(anchors, candidate_anchors(length, loss_start))]


def draw_regions(
    examples: Sequence[Example], k_most: int, region_rows: int, random: np.random.Generator
) -> tuple[int, int]:
    """(k, offset) of a micro-batch; k is uniform from 2 to `k_most`.

    The offset is such that a random position of a random response is an anchor, so that every step trains
    something, however short the responses are.

    Raises:
        ValueError: no response has a position that can be an anchor.
    """
    k = int(random.integers(2, k_most + 1))
    candidates = [candidate_anchors(len(example), example.loss_start) for example in examples]
    usable = [own for own in candidates if len(own)]
    if not usable:
        raise ValueError("no region in this batch: every response is shorter than two tokens")
    anchor = int(random.choice(usable[int(random.integers(len(usable)))]))
    real = real_tokens(k, region_rows)
    return k, (real - 1 - anchor) % real
