"""Tiny models with random PTP adapters, and a drafter that knows the text and still places slots as the real one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from typing import Any
from unittest import mock

import mlx.core as mx
import numpy as np

from mtp_mlx.decode.drafter import LazyDrafts, Verified
from mtp_mlx.decode.pick import Picker
from mtp_mlx.decode.tree import depths_of
from mtp_mlx.drafters.ptp.config import PTPConfig
from mtp_mlx.drafters.ptp.draft import PTPSlotDrafter
from mtp_mlx.drafters.ptp.weights import PTPAdapter, new_ptp_adapter
from mtp_mlx.model.attach import AttachedModel, attach
from tests.decode.fakes import KnowingDrafter
from tests.tiny import tiny_model

MOST_SLOTS = 4


def random_ptp_adapter(
    model: Any, seed: int = 0, draft_ids: mx.array | None = None, **config: Any
) -> PTPAdapter:
    """An adapter none of whose weights is zero, so that a gate that leaks changes logits."""
    shape = PTPConfig(**{"slots": MOST_SLOTS, "rank": 3, "alpha": 6.0, **config})
    adapter = new_ptp_adapter(model, shape, draft_ids)
    rng = np.random.default_rng(seed)
    adapter.load_tensors(
        {
            name: value
            if name == "draft_ids"
            else mx.array(0.3 * rng.normal(size=value.shape).astype(np.float32))
            for name, value in adapter.tensors().items()
        }
    )
    mx.eval(adapter.parameters())
    return adapter


@lru_cache(maxsize=64)
def ptp_attached(architecture: str, variant: str, embedding: str, **overrides: Any) -> AttachedModel:
    """A tiny model with a random PTP adapter; shared, as one generation leaves nothing behind in a model."""
    model = tiny_model(architecture, seed=3, **overrides)
    return attach(model, random_ptp_adapter(model, variant=variant, embedding=embedding))


class KnowingPTPDrafter(PTPSlotDrafter):
    """Slots carry uniforms as ever; only what is drafted from them is replaced (see `KnowingDrafter`)."""

    def __init__(
        self,
        attached: AttachedModel,
        picker: Picker,
        config: PTPConfig,
        truth: Sequence[int],
        start: int,
        probability: float,
        seed: int,
    ) -> None:
        super().__init__(attached, picker, config)
        self._knowing = KnowingDrafter(truth, start, probability, seed)

    def propose(self, verified: Verified) -> LazyDrafts:
        """The known text, as many positions as the real drafter drafts."""
        own, known = super().propose(verified), self._knowing.propose(verified)
        count = own.ids.shape[0]
        if own.parents is not None:
            count = max(depths_of(own.parents.tolist()))
        return LazyDrafts(known.ids[:count] + 0 * own.ids[:count], known.confidences[:count])


@contextmanager
def ptp_drafting(truth: Sequence[int], start: int, probability: float, seed: int) -> Iterator[None]:
    """The loop's PTP drafter knows the text."""

    class Knowing(KnowingPTPDrafter):
        def __init__(self, model: AttachedModel, picker: Picker, config: PTPConfig) -> None:
            super().__init__(model, picker, config, truth, start, probability, seed)

    with mock.patch("mtp_mlx.drafters.ptp.weights.PTPSlotDrafter", Knowing):
        yield
