"""Proves the weights of a micro-batch's rows, which its slices share, against counting one row at a time."""

from __future__ import annotations

import numpy as np

from mtp_mlx.drafters.masks.step import row_weights
from mtp_mlx.drafters.slots.layout import build_layout

SEQUENCES = [list(range(3, 20)), list(range(30, 39))]
ANCHORS = [np.array([2, 3, 4, 9, 14]), np.array([0, 1, 6])]


def test_every_real_row_counts_once_and_its_slots_share_it() -> None:
    layout = build_layout(SEQUENCES, ANCHORS, 3, 2)
    weights = row_weights(layout, 0.5)
    targets = layout.target.tolist()
    real = set(targets)
    assert len(real) < len(targets), "some real rows have several slots"
    seen: set[int] = set()
    for row, target in enumerate(targets):
        assert weights.first[row] == (target not in seen)
        seen.add(target)
        assert weights.loss[row] == 0.5 ** (layout.depth[row] - 1)
        assert weights.matching[row] == np.float32(1 / (targets.count(target) * len(real)))
    assert weights.first.sum() == len(real)
    np.testing.assert_allclose(weights.matching.sum(), 1, rtol=1e-6)
