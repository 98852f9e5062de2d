"""Exact decoding gives mlx-lm's own logits bit for bit on every architecture of mlx-lm, or is refused by name."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import pytest
from mlx_lm.generate import generate_step
from mlx_lm.models.cache import KVCache, RotatingKVCache

from mtp_mlx.decode.loop import mtp_generate_step
from mtp_mlx.decode.stats import DecodeStats
from mtp_mlx.errors import MTPError
from mtp_mlx.model.attach import attach
from tests.decode.test_hybrid_loop import KnowingLookup, Uneven
from tests.tiny import SPECIFIC, tiny_model

PROMPT = [3, 5, 7, 11, 90, 2, 4]
TOKENS = 24


def mlx_lm_logits(model: Any) -> tuple[list[int], list[mx.array]]:
    """Tokens and raw logits of mlx-lm's own generation; skips what runs on Metal only."""
    seen: list[mx.array] = []
    keep = [lambda _, logits: seen.append(logits[0]) or logits]
    try:
        steps = generate_step(mx.array(PROMPT), model, max_tokens=TOKENS, logits_processors=keep)
        tokens = [int(token) for token, _ in steps]
    except RuntimeError as error:
        if "No Metal back-end" not in str(error):
            raise
        pytest.skip("mlx-lm runs this architecture on Metal only")
    return tokens, seen[:TOKENS]


@pytest.mark.parametrize("name", SPECIFIC)
def test_logits_are_those_of_mlx_lm_or_the_model_is_refused(name: str) -> None:
    tokens, logits = mlx_lm_logits(tiny_model(name, seed=3))
    stats = DecodeStats()
    try:
        model = attach(tiny_model(name, seed=3), exact=True)
        lookup = KnowingLookup(tokens, len(PROMPT), (False, False, True, False))
        steps = mtp_generate_step(
            PROMPT, model, max_tokens=TOKENS, policy=Uneven(4), lookup=lookup, stats=stats
        )
        found = list(steps)
    except MTPError as error:
        assert "exact decoding does not support" in str(error) or "no seam" in str(error), error
        return
    assert [item.token for item in found] == tokens and sum(stats.accepted) > 4
    for at, (item, expected) in enumerate(zip(found, logits, strict=True)):
        assert mx.array_equal(item.logits, expected).item(), f"token {at}"


@pytest.mark.parametrize("name", ["afm7", "gemma4", "gemma4_text", "iquestloopcoder"])
def test_layers_that_read_another_layer_s_keys_are_refused(name: str) -> None:
    """Such calls say nothing of the window or the tree that the keys belong to."""
    refused = (
        "layers (that read the keys of another layer|outside the trunk's list|that the trunk takes apart)"
    )
    with pytest.raises(MTPError, match=f"exact decoding does not support {refused}"):
        attach(tiny_model(name, seed=3), exact=True)


def test_layers_that_read_a_rotating_cache_again_are_refused() -> None:
    """afm7's last layers; in one sentence, where it was an AttributeError."""
    model = attach(tiny_model("afm7", seed=3))
    cache = [RotatingKVCache(6) if type(one) is KVCache else one for one in model.make_cache()]
    with pytest.raises(MTPError, match="read the last layer's cache again"):
        next(mtp_generate_step(PROMPT, model, max_tokens=TOKENS, prompt_cache=cache))
