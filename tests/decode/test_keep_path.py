"""Any ascending rows of a pass can be kept in every kind of cache whose rows can be moved; others verify chains."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm.models.cache import KVCache, QuantizedKVCache, RotatingKVCache

from mtp_mlx.decode.loop import mtp_generate_step
from mtp_mlx.decode.pick import SamplingConfig
from mtp_mlx.decode.policy import Proposal
from mtp_mlx.decode.rollback import LayerCaches
from mtp_mlx.decode.stats import DecodeStats
from mtp_mlx.decode.tree import DraftTree
from mtp_mlx.model.attach import attach
from mtp_mlx.planning.grow import TreePolicy
from tests.decode.test_hybrid_loop import KnowingLookup
from tests.tiny import tiny_model

KINDS: dict[str, Any] = {
    "ordinary": KVCache,
    "8 bits": lambda: QuantizedKVCache(group_size=32, bits=8),
    "window": lambda: RotatingKVCache(max_size=9),
}


def rows_of(rng: np.random.Generator, count: int) -> list[tuple[mx.array, mx.array]]:
    return [
        (mx.array(rng.normal(size=(1, 2, 1, 32))), mx.array(rng.normal(size=(1, 2, 1, 32))))
        for _ in range(count)
    ]


def seen(layer: Any, rows: list[tuple[mx.array, mx.array]]) -> list[np.ndarray]:
    """What attention gets after these rows, as flat arrays."""
    keys, values = (mx.concatenate(parts, axis=2) for parts in zip(*rows, strict=True))
    return [np.array(array) for _, array in tree_flatten(layer.update_and_fetch(keys, values))]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("kept", [[0], [0, 1, 2], [0, 2], [0, 1, 4, 5], [0, 3, 4, 6], [0, 6]])
def test_the_cache_is_as_if_only_those_rows_had_been_there(kind: str, kept: list[int]) -> None:
    rng = np.random.default_rng(len(kept))
    prefix, block, after = rows_of(rng, 12), rows_of(rng, 7), rows_of(rng, 2)
    caches = LayerCaches([KINDS[kind]()], "test")
    assert caches.keeps_paths
    caches.mark(12)
    seen(caches.layers[0], prefix)
    caches.mark(7)
    seen(caches.layers[0], block)
    caches.keep_path(kept)
    alone = LayerCaches([KINDS[kind]()], "test")
    alone.mark(12)
    seen(alone.layers[0], prefix)
    alone.mark(len(kept))
    seen(alone.layers[0], [block[row] for row in kept])
    assert caches.length == alone.length == 12 + len(kept)
    for cache in (caches, alone):
        cache.mark(2)
    for ours, expected in zip(seen(caches.layers[0], after), seen(alone.layers[0], after), strict=True):
        np.testing.assert_array_equal(ours, expected)


@pytest.mark.parametrize(
    ("name", "branches"), [("llama", True), ("gemma3_text", True), ("qwen3_next", False)]
)
def test_models_that_cannot_keep_a_path_verify_chains_and_say_so_once(name: str, branches: bool) -> None:
    model = attach(tiny_model(name, seed=3))
    prompt, sampling = [5, 9, 2], SamplingConfig(temperature=0.8, seed=1)
    truth = [item.token for item in mtp_generate_step(prompt, model, max_tokens=20, sampling=sampling)]

    class Policy(TreePolicy):
        """Proposes a wrong sibling beside every lookup."""

        def choose(self, proposals: Any) -> Any:
            wrong = Proposal("wrong", DraftTree.chain([1], [0.01]))
            return super().choose([*proposals, wrong])

    stats = DecodeStats()
    steps = mtp_generate_step(
        prompt,
        model,
        max_tokens=20,
        sampling=sampling,
        policy=Policy(8, 0, [], places_slots=False),
        lookup=KnowingLookup(truth, len(prompt), (False, False, True)),
        stats=stats,
    )
    assert [item.token for item in steps] == truth
    assert any(layout.startswith("tree") for layout in stats.layouts) == branches
    assert list(stats.fallbacks.values()) == ([] if branches else [1])
    assert sum(stats.accepted) > 3
