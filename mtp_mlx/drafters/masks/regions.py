"""Where the regions of online self-distillation lie in a text (arXiv 2602.06019, training).

A region is P real tokens and the k - 1 masks behind them; the last real row and the masks predict k tokens. Regions
follow each other in one row with the tokens hidden under a region's masks standing again, as real tokens, behind
them, so positions occur twice on purpose. `offset` shifts the regions to the left in the text: the first one has so
many real tokens less, and as many more stand at the end.

    3 regions, k 3, 6 rows a region, offset 0      pos   0 1 2 3 M4 M5 | 4 5 6 7 M8 M9 | 8 9 10 11 M12 M13
    the same with offset 2                         pos   0 1 M2 M3 | 2 3 4 5 M6 M7 | 6 7 8 9 M10 M11 | 10 11

Real rows of all regions are the text itself, each token once. So this is also a layout of slots behind anchors (the
regions' last real tokens), which is how gated LoRA trains, without a second copy of any token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mtp_mlx.drafters.slots.layout import candidate_anchors
from mtp_mlx.train.data import Example


@dataclass(frozen=True)
class RegionLayout:
    """The rows of one sequence. S rows.

    Attributes:
        positions: [S] int32 position in the text of each row; the token a mask hides stands there.
        masked: [S] bool, rows whose input is the mask.
        predicts: [S] bool, the last real row of each region and its masks.
        region: [S] int32, the region of each row.
        k: tokens a region predicts.
    """

    positions: np.ndarray
    masked: np.ndarray
    predicts: np.ndarray
    region: np.ndarray
    k: int

    @property
    def groups(self) -> np.ndarray:
        """[regions, k] rows that predict, region by region."""
        return np.flatnonzero(self.predicts).reshape(-1, self.k)

    @property
    def anchors(self) -> np.ndarray:
        """[regions] position of each region's last real token."""
        return self.positions[self.groups[:, 0]]

    def visibility(self) -> np.ndarray:
        """[S, S] bool: every row sees the real rows before it, a mask also its own region's masks before it."""
        earlier = np.tril(np.ones((len(self.positions),) * 2, dtype=bool))
        own_mask = self.masked[None] & (self.region[:, None] == self.region[None]) & self.masked[:, None]
        return earlier & (~self.masked[None] | own_mask)


def real_tokens(k: int, region_rows: int) -> int:
    """P, real tokens of a region.

    Raises:
        ValueError: the region has no room for one.
    """
    if region_rows < k or k < 1:
        raise ValueError(f"a region of {region_rows} rows has no room for {k - 1} masks and a real token")
    return region_rows - (k - 1)


def region_layout(regions: int, k: int, offset: int, region_rows: int) -> RegionLayout:
    """Rows of `regions` regions of `region_rows` rows each.

    Args:
        k: tokens a region predicts; k - 1 masks.
        offset: shift to the left, 0 <= offset < P.

    Raises:
        ValueError: no room for a real token, or an offset that would swallow the first region.
    """
    real = real_tokens(k, region_rows)
    if not 0 <= offset < real:
        raise ValueError(f"offset {offset} is not below the {real} real tokens of a region")
    row = np.arange(offset, offset + regions * region_rows)  # of regions that go on for ever
    region, within = np.divmod(row, region_rows)
    return RegionLayout(
        positions=(region * real + within - offset).astype(np.int32),
        masked=within >= real,
        predicts=(within >= real - 1) & (region < regions),
        region=region.astype(np.int32),
        k=k,
    )


def regions_over(length: int, k: int, offset: int, region_rows: int) -> int:
    """How many regions it takes until the last one's anchor is the text's last token or behind it."""
    return -(-(length + offset) // real_tokens(k, region_rows))


def region_anchors(length: int, loss_start: int, k: int, offset: int, region_rows: int) -> np.ndarray:
    """Anchors of the regions that learn: with a response token for their first mask to predict.

    Regions whose masks would all stand behind the end of the text are left out, as in the paper; so are those
    inside a prompt, which the paper keeps.
    """
    real = real_tokens(k, region_rows)
    anchors = np.arange(real - 1 - offset, length, real, dtype=np.int32)
    return anchors[np.isin(anchors, candidate_anchors(length, loss_start))]


def draw_regions(
    examples: Sequence[Example], k_most: int, region_rows: int, random: np.random.Generator
) -> tuple[int, int]:
    """A step's k, uniform from 2 to `k_most`, and an offset.

    The offset is drawn by drawing which position of which response must be an anchor, so that every step learns
    something, however short its responses are.

    Raises:
        ValueError: no example has a position to learn at.
    """
    k = int(random.integers(2, k_most + 1))
    candidates = [candidate_anchors(len(example), example.loss_start) for example in examples]
    usable = [own for own in candidates if len(own)]
    if not usable:
        raise ValueError("no region in this batch: every response is shorter than two tokens")
    anchor = int(random.choice(usable[int(random.integers(len(usable)))]))
    real = real_tokens(k, region_rows)
    return k, (real - 1 - anchor) % real
