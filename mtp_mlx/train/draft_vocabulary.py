"""The draft vocabulary of a training run: the ids that responses use most (design 2.6)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import mlx.core as mx

from mtp_mlx.train.data import Example


def draft_vocabulary(examples: Sequence[Example], size: int, vocab_size: int) -> mx.array | None:
    """[size] int32 sorted ids most used in the responses (design 2.6); None for the whole vocabulary."""
    if size == 0 or size >= vocab_size:
        return None
    counts = Counter(token for example in examples for token in example.tokens[example.loss_start :])
    order = [token for token, _ in sorted(counts.items(), key=lambda item: (-item[1], item[0]))[:size]]
    if len(order) < size:  # low ids are the frequent merges of a byte-pair vocabulary
        known = set(order)
        order += [token for token in range(vocab_size) if token not in known][: size - len(order)]
    return mx.array(sorted(order), dtype=mx.int32)
