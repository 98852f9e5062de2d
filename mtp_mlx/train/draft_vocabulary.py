"""The draft vocabulary of a training run: the ids that the responses use most (design 2.6)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import mlx.core as mx
import numpy as np

from mtp_mlx.model.attach import AttachedModel
from mtp_mlx.train.data import Example


def draft_vocabulary(examples: Sequence[Example], size: int, vocab_size: int) -> mx.array | None:
    """The `size` ids most used in the responses, int32 [size], ascending; None for the whole vocabulary."""
    if size == 0 or size >= vocab_size:
        return None
    counts = Counter(token for example in examples for token in example.tokens[example.loss_start :])
    order = [token for token, _ in sorted(counts.items(), key=lambda item: (-item[1], item[0]))[:size]]
    if len(order) < size:  # low ids are the frequent merges of a byte-pair vocabulary
        known = set(order)
        order += [token for token in range(vocab_size) if token not in known][: size - len(order)]
    return mx.array(sorted(order), dtype=mx.int32)


def draft_columns(attached: AttachedModel) -> np.ndarray:
    """Column of the draft head of every id, int32 [V]; -1 for ids outside the draft vocabulary."""
    ids = attached.draft_ids
    if ids is None:
        return np.arange(attached.vocab_size, dtype=np.int32)
    columns = np.full(attached.vocab_size, -1, dtype=np.int32)
    columns[np.array(ids)] = np.arange(len(ids), dtype=np.int32)
    return columns


def same_draft_ids(own: mx.array | None, other: mx.array | None) -> bool:
    """Whether two draft vocabularies are the same; None is the whole vocabulary."""
    return ([] if own is None else own.tolist()) == ([] if other is None else other.tolist())
