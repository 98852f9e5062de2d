"""What the wrappers on a model need to know about the forward pass in progress.

Each attached model has one `RowContext`, to which every wrapper holds a reference. Only `RowContext.running` writes
it, while the graph of a forward pass is built. Outside such a pass it is empty, and every wrapper just calls the
module it wraps.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
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
        n_real: number of real rows, which come first; None outside a pass (then every row is real).
        positions: [R] or [B, R] int32 explicit positions; None if they continue those in the cache.
        visibility: [R, R] bool; None if causal.
        uniforms: [R - n_real] or [B, R - n_real] float32, the uniform of each slot row, or None (see `Block`).
        windowed: whether some layer of this pass sees only a sliding window of a cache that holds more.
        is_step: whether this pass is a decoding step, of which some real rows may be rolled back.
        n_exact: leading rows of this pass that must equal one-row passes, bit for bit.
        paths: for every real row, the real rows that it sees, itself last; empty if they are a chain.
        step_kernels: kernels that may run in this pass: `kernels` in a decoding step, else None, so that prompts run
            as in mlx-lm.
        kernels: kernels that may run in decoding steps, or None. This and `exact` outlive the pass.
        exact: whether the real rows of decoding steps are exact.
        ungated: whether LoRA acts on real rows too, as an ordinary LoRA does.
    """

    n_real: int | None = None
    positions: mx.array | None = None
    visibility: mx.array | None = None
    uniforms: mx.array | None = None
    windowed: bool = False
    is_step: bool = False
    n_exact: int = 0
    paths: tuple[tuple[int, ...], ...] = ()
    step_kernels: Dispatcher | None = None
    kernels: Dispatcher | None = None
    exact: bool = False
    ungated: bool = False
    _words: mx.array | None = None

    def path(self, row: int) -> Sequence[int]:
        """The real rows of the pass that real row `row` sees, itself last; one for every position."""
        return self.paths[row] if self.paths else range(row + 1)

    @property
    def first_gated(self) -> int | None:
        """First row of the pass that LoRA acts on; None outside a pass."""
        return 0 if self.ungated and self.n_real is not None else self.n_real

    @contextmanager
    def placed(self, positions: mx.array | None) -> Iterator[None]:
        """Layers called in this context get rows with these positions instead of those of the pass."""
        known, self.positions = self.positions, positions
        try:
            yield
        finally:
            self.positions = known

    @contextmanager
    def slots_alone(self) -> Iterator[None]:
        """Layers called in this context get slot rows only."""
        known = self.n_real, self.n_exact
        self.n_real = self.n_exact = 0
        try:
            yield
        finally:
            self.n_real, self.n_exact = known

    def visibility_words(self, n_rows: int) -> mx.array | None:
        """[R] uint32 bit masks of the rows that each row sees, for the kernel `block_attention`; once per pass.

        None outside a pass, for a single row, and for more rows than the kernel supports.
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
        self.is_step, self.paths = block.is_step, block.paths
        self.uniforms = block.uniforms
        self.n_exact = block.n_real if self.exact and block.is_step else 0
        self.step_kernels = self.kernels if block.is_step else None
        try:
            yield
        finally:
            self.n_real = self.positions = self.visibility = self.uniforms = None
            self.is_step, self.paths = False, ()
            self.windowed, self.n_exact, self.step_kernels, self._words = False, 0, None, None
