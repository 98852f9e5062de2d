"""What the wrappers on a model have to know about the forward pass in progress.

One `RowContext` belongs to one attached model; every wrapper holds a reference. It is written only by
`RowContext.running` around the construction of one forward pass, so a wrapper never guesses.
Outside such a pass the context is empty and every wrapper is the module it wraps.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import mlx.core as mx

from mtp_mlx.model.block import Block


@dataclass
class RowContext:
    """The forward pass in progress.

    Attributes:
        n_real: rows before this index are real; None outside a pass (then every row is real).
        positions: [R] or [B, R] int32 explicit positions, or None for contiguous ones.
        visibility: [R, R] bool, or None for causal.
    """

    n_real: int | None = None
    positions: mx.array | None = None
    visibility: mx.array | None = None

    @contextmanager
    def running(self, block: Block) -> Iterator[None]:
        """Makes `block` the pass in progress while the graph of its forward pass is built."""
        self.n_real, self.positions, self.visibility = block.n_real, block.positions, block.visibility
        try:
            yield
        finally:
            self.n_real = self.positions = self.visibility = None
