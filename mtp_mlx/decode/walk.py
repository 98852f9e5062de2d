"""Verification of a tree: the walk from the root along the drafts that equal the target's picks, lazily.

Legend: d drafts, D drafts on the longest path.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import mlx.core as mx
import numpy as np

from mtp_mlx.decode.tree import ROOT, depths_of


class Walk(NamedTuple):
    """The accepted path.

    Attributes:
        accepted: int32 scalar a, number of accepted drafts.
        last: int32 scalar, real row of the last of them; 0 if none was accepted.
        path: [1 + D] int32 real rows of the pending token and of the accepted drafts, then `last` repeated.
    """

    accepted: mx.array
    last: mx.array
    path: mx.array


def walk(picks: mx.array, drafts: mx.array, parents: tuple[int, ...]) -> Walk:
    """Walks from the pending token to the child whose token equals the pick, and on from there.

    Args:
        picks: [1 + d] int32, the target's pick after each real row.
        drafts: [d] int32 token ids; siblings have different ones, so that at most one of them equals the pick.
        parents: [d] index of each draft's parent, `ROOT` for the pending token.
    """
    ancestors, depths = (mx.array(matrix) for matrix in _matrices(parents))
    wrong = (picks[mx.array([parent + 1 for parent in parents])] != drafts).astype(mx.int32)  # [d]
    on_path = (mx.sum(ancestors * wrong, axis=1) == 0).astype(mx.int32)  # [d]
    rows = on_path * mx.arange(1, 1 + len(parents), dtype=mx.int32)  # a draft comes after its ancestors
    last = mx.max(rows)
    reached = mx.sum(depths * rows, axis=1)  # [D], 0 beyond the last accepted draft
    path = mx.concatenate([mx.zeros((1,), dtype=mx.int32), mx.where(reached == 0, last, reached)])
    return Walk(mx.sum(on_path), last, path)


@lru_cache(maxsize=512)
def _matrices(parents: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """int32 matrices of 0 and 1: [d, d] of each draft's ancestors and itself, [D, d] of the drafts of each depth."""
    ancestors = np.eye(len(parents), dtype=np.int32)
    for node, parent in enumerate(parents):
        if parent != ROOT:
            ancestors[node] |= ancestors[parent]
    depths = np.array(depths_of(parents))
    return ancestors, (depths == np.arange(1, 1 + depths.max())[:, None]).astype(np.int32)
