"""Attached tiny models with adapters that do something, and a drafter that knows the text."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from typing import Any
from unittest import mock

import mlx.core as mx
import numpy as np

from mtp_mlx.decode.drafter import Drafter, LazyDrafts, Verified
from mtp_mlx.decode.policy import FixedPolicy
from mtp_mlx.drafters.masks.weights import MaskAdapter, MaskAdapterConfig, new_adapter
from mtp_mlx.model.attach import AttachedModel, attach
from tests.tiny import VOCABULARY, tiny_model

MOST_SLOTS = 4


def random_adapter(model: Any, slots: int = MOST_SLOTS, seed: int = 0) -> MaskAdapter:
    """An adapter none of whose weights is zero, so that a gate that leaks changes logits."""
    adapter = new_adapter(model, MaskAdapterConfig(slots=slots, rank=3, alpha=6.0))
    rng = np.random.default_rng(seed)
    adapter.load_tensors(
        {
            name: mx.array(0.3 * rng.normal(size=value.shape).astype(np.float32))
            for name, value in adapter.tensors().items()
        }
    )
    mx.eval(adapter.parameters())
    return adapter


@lru_cache(maxsize=32)
def attached(architecture: str, **overrides: Any) -> AttachedModel:
    """A tiny model with a random adapter; shared, as one generation leaves nothing behind in a model."""
    model = tiny_model(architecture, seed=3, **overrides)
    return attach(model, random_adapter(model))


@lru_cache(maxsize=32)
def untouched(architecture: str, **overrides: Any) -> Any:
    """The same tiny model as `attached`, never attached to: what mlx-lm itself is run on."""
    return tiny_model(architecture, seed=3, **overrides)


class KnowingDrafter(Drafter):
    """Drafts the true continuation, each token with some probability and a wrong one otherwise.

    The slot rows of the block are there as ever; only what is drafted from them is replaced.
    """

    def __init__(self, truth: Sequence[int], start: int, probability: float, seed: int) -> None:
        """truth[i] is the token at absolute position start + i."""
        rng = np.random.default_rng(seed)
        length = start + len(truth) + 2 * MOST_SLOTS + 2
        table = rng.integers(0, VOCABULARY, (length, MOST_SLOTS))
        for position in range(start, length):
            for slot in range(MOST_SLOTS):
                index = position - start + slot + 1
                if index < len(truth):
                    wrong = (truth[index] + rng.integers(1, VOCABULARY)) % VOCABULARY
                    table[position, slot] = truth[index] if rng.random() < probability else wrong
        self._table = mx.array(table.astype(np.int32))

    def propose(self, verified: Verified) -> LazyDrafts:
        """See `Drafter.propose`."""
        shape = verified.shape
        count = int(max(np.diff([*shape.group_start, shape.rows])))
        sure = mx.full((count,), 0.5) + 0 * verified.hidden[-1, 0]
        return LazyDrafts(self._table[verified.position][:count], sure)


@contextmanager
def drafting(drafter: KnowingDrafter | None) -> Iterator[None]:
    """Replaces the drafter that the loop makes; None leaves it."""
    if drafter is None:
        yield
        return
    with mock.patch("mtp_mlx.drafters.masks.weights.MaskSlotDrafter", lambda *_, **__: drafter):
        yield


class PlainWatching(FixedPolicy):
    """Plain steps, and what they were told when they began."""

    def __init__(self) -> None:
        super().__init__("plain", 0)
        self.contexts: list[int] = []

    def begin(self, context: int, *, branches: bool = True) -> None:
        """See `Policy`."""
        self.contexts.append(context)
