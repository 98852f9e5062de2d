"""What a session is told about its cache, and what its steps give."""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx


@dataclass(frozen=True)
class CacheSettings:
    """KV-cache options, named and meant as in mlx-lm. kv_bits None keeps the cache unquantised."""

    kv_bits: int | None = None
    kv_group_size: int = 64
    quantized_kv_start: int = 5000
    prefill_step_size: int = 2048


@dataclass(frozen=True)
class StepResult:
    """One step, read on the host.

    Attributes:
        tokens: accepted drafts, then the target's own pick.
        n_accepted: number of accepted drafts.
        drafts, confidences: fresh drafts for the next positions.
        logits: [1 + d, V], row i predicts tokens[i]; lazy.
        rows: rows of the pass.
    """

    tokens: list[int]
    n_accepted: int
    drafts: list[int]
    confidences: list[float]
    logits: mx.array
    rows: int


@dataclass(frozen=True)
class LazyStep:
    """One step whose pass has run and whose outcome the host has not read yet.

    Attributes:
        integers: int32, how many drafts were accepted, then the target's picks [1 + d], then fresh drafts.
        confidences: of the fresh drafts.
        logits: [1 + d, V].
        head_input: [1, 1 + d, D], the real rows' states that MTP heads take.
        rows: rows of the pass.
    """

    integers: mx.array
    confidences: mx.array
    logits: mx.array
    head_input: mx.array
    rows: int
