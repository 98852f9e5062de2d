"""Proves that each family's heads, converted and run, compute what an independent numpy forward computes.

A tiny PyTorch file with the family's own names is converted whole from the command line and loaded for its trunk as
mlx-lm loads it; logits of trunk and heads are compared, the drafts of a decoding step too, and the comparison is
shown to fail for every convention that could be mistaken.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.generate import generate_step

from mtp_mlx import load, stream_generate
from mtp_mlx.decode.pick import SamplingConfig
from mtp_mlx.drafters.heads.cascade import MTPHeads
from tests.convert.heads.numpy_heads import Rules
from tests.convert.heads.parity_families import FAMILIES
from tests.convert.heads.parity_setup import TOKENS, TOLERANCE, Parity, drafts_of_two_steps, same_text, worst

WRONG: dict[str, Callable[[Rules], Rules]] = {
    "order of concatenation": lambda rules: replace(rules, hidden_first=not rules.hidden_first),
    "norms around zero or not": lambda rules: replace(rules, plus=1 - rules.plus),
    "first hidden state": lambda rules: replace(
        rules, first="pre-norm" if rules.first == "post-norm" else "post-norm"
    ),
    "recycled hidden state": lambda rules: replace(
        rules, recycled="raw" if rules.recycled == "normed" else "normed"
    ),
    "position 0 masked": lambda rules: replace(rules, mask_first=not rules.mask_first),
    "output norm": lambda rules: replace(rules, out_norm=False),
}
MADE: dict[str, Parity] = {}
SAMPLED = ["llama with own heads", "longcat-flash", "step-3.5"]


@pytest.fixture
def parity(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Parity:
    """The family of the test's first parameter; made once."""
    name = request.param
    if name not in MADE:
        MADE[name] = Parity.of(name, tmp_path_factory.mktemp("parity"))
    return MADE[name]


@pytest.mark.parametrize("parity", list(FAMILIES), indirect=True)
def test_trunk(parity: Parity) -> None:
    """The states and logits of the trunk that mlx-lm loads are the oracle's."""
    ids = mx.array([TOKENS])
    found = np.array(parity.trunk(ids)[0])
    expected = parity.states(TOKENS)["post-norm"]
    np.testing.assert_allclose(found, expected, atol=TOLERANCE, rtol=TOLERANCE)
    logits = expected @ parity.made.stored["lm_head.weight"].T.astype(np.float64)
    np.testing.assert_allclose(np.array(parity.model(ids)[0]), logits, atol=TOLERANCE, rtol=TOLERANCE)


@pytest.mark.parametrize("parity", list(FAMILIES), indirect=True)
def test_heads(parity: Parity) -> None:
    found, expected = parity.logits, parity.expected()
    assert np.std(expected[0]) > 0.3 and len(found) == parity.family.depths
    assert worst(found, expected) < TOLERANCE


@pytest.mark.parametrize("wrong", list(WRONG))
@pytest.mark.parametrize("parity", list(FAMILIES), indirect=True)
def test_a_wrong_convention_fails(parity: Parity, wrong: str) -> None:
    rules = WRONG[wrong](parity.family.rules)
    difference = worst(parity.logits, parity.expected(rules))
    assert difference > 100 * TOLERANCE


@pytest.mark.parametrize("parity", ["step-3.5", "longcat-flash"], indirect=True)
def test_shared_instead_of_own_fails(parity: Parity) -> None:
    """Step-3.5's LM heads and LongCat's embedding are their own, and not the trunk's."""
    family = parity.family
    shared = [replace(n, lm_head="lm_head", embed_tokens="model.embed_tokens") for n in family.names]
    mistaken = replace(parity, family=replace(family, names=shared)).expected()
    assert worst(parity.logits, mistaken) > 100 * TOLERANCE


@pytest.mark.parametrize("parity", list(FAMILIES), indirect=True)
def test_drafts_of_a_step(parity: Parity) -> None:
    """What the decode loop drafts behind a prompt, and behind a block of drafts of which two are accepted."""
    found, expected = drafts_of_two_steps(parity)
    assert found == expected


@pytest.mark.parametrize("parity", list(FAMILIES), indirect=True)
def test_the_text_is_that_of_plain_decoding(parity: Parity) -> None:
    same_text(parity, SamplingConfig())


@pytest.mark.parametrize("parity", list(FAMILIES), indirect=True)
def test_the_converted_folder_is_loaded_and_decoded(parity: Parity) -> None:
    """As a user does it: `load(OUT)` finds the heads beside the trunk, and the text is mlx-lm's own."""
    beside = parity.heads_folder.name == "mtp"
    model, tokenizer = load(str(parity.folder), "auto" if beside else parity.heads_folder)
    assert isinstance(model.speculator, MTPHeads) and model.info == parity.info
    options: dict[str, Any] = {"max_tokens": 10, "layout": "linear", "slots": parity.family.depths}
    found = [item.token for item in stream_generate(model, tokenizer, TOKENS[:9], **options)]
    theirs = generate_step(mx.array(TOKENS[:9]), parity.model, max_tokens=10)
    assert (
        found == [int(token) for token, _ in theirs][: len(found)] and len(found) > 1
    )  # or one that ends the text
    assert model.info.base_fingerprint is not None


@pytest.mark.parametrize("parity", SAMPLED, indirect=True)
def test_sampled_text_is_that_of_plain_decoding(parity: Parity) -> None:
    same_text(parity, SamplingConfig(temperature=0.9, seed=5))
