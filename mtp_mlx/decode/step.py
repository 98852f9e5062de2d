"""What a session is told about its cache, and what its steps give."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

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


class Token(NamedTuple):
    """One committed token.

    Attributes:
        token: its id.
        logits: [V] the target's raw logits at this position, computed by the pass anyway; lazy. Of a draft that
            was emitted without verification: the raw logits of its slot.
        from_draft: it was drafted, and accepted (the text is the same either way) or emitted unverified.
        depth: which draft of its step it was, from 1; 0 for the target's own pick.
    """

    token: int
    logits: mx.array
    from_draft: bool
    depth: int
