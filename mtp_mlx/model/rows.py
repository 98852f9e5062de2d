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

from mtp_mlx.metal_kernels.block_attention import MAX_ROWS, visibility_words
from mtp_mlx.metal_kernels.dispatch import Dispatcher
from mtp_mlx.model.block import Block


@dataclass
class RowContext:
    """The forward pass in progress.

    Attributes:
        n_real: rows before this index are real; None outside a pass (then every row is real).
        positions: [R] or [B, R] int32 explicit positions, or None for contiguous ones.
        visibility: [R, R] bool, or None for causal.
        windowed: some layer of this pass sees a sliding window only, of a cache that holds more.
        is_step: this pass is a decoding step, of whose real rows some may be taken back.
        n_exact: leading rows of this pass that must be what passes over one row give, bit for bit.
        step_kernels: what may run in place of stock MLX in this pass: `kernels` in a decoding step, else None, so
            that prompts are read as mlx-lm reads them.
        kernels: what may run in decoding steps, or None. This and `exact` outlive the pass.
        exact: the real rows of decoding steps are exact.
    """

    n_real: int | None = None
    positions: mx.array | None = None
    visibility: mx.array | None = None
    windowed: bool = False
    is_step: bool = False
    n_exact: int = 0
    step_kernels: Dispatcher | None = None
    kernels: Dispatcher | None = None
    exact: bool = False
    _words: mx.array | None = None

    def visibility_words(self, n_rows: int) -> mx.array | None:
        """Whom each of the pass's rows sees, uint32 [R], as `block_attention` wants it; made once per pass.

        None outside a pass, and for one row or more rows than the kernel takes.
        """
        if self.n_real is None or not 2 <= n_rows <= MAX_ROWS:
            return None
        if self._words is None:
            visibility = self.visibility
            if visibility is None:
                visibility = mx.tril(mx.ones((n_rows, n_rows), dtype=mx.bool_))
            self._words = visibility_words(visibility)
        return self._words

    @contextmanager
    def running(self, block: Block) -> Iterator[None]:
        """Makes `block` the pass in progress while the graph of its forward pass is built."""
        self.n_real, self.positions, self.visibility = block.n_real, block.positions, block.visibility
        self.is_step = block.is_step
        self.n_exact = block.n_real if self.exact and block.is_step else 0
        self.step_kernels = self.kernels if block.is_step else None
        try:
            yield
        finally:
            self.n_real = self.positions = self.visibility = None
            self.is_step = False
            self.windowed, self.n_exact, self.step_kernels, self._words = False, 0, None, None
