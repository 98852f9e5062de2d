"""Drafts from shortlists are those of the whole vocabulary if every token is listed, and never change the text."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from mtp_mlx.decode.drafter import LazyDrafts, Verified
from mtp_mlx.decode.loop import mtp_generate_step
from mtp_mlx.decode.pick import Picker, SamplingConfig
from mtp_mlx.decode.policy import FixedPolicy
from mtp_mlx.drafters.masks import shortlist as module
from mtp_mlx.drafters.masks.draft import MaskSlotDrafter
from mtp_mlx.drafters.masks.weights import SamplerHead
from mtp_mlx.model.attach import AttachedModel, attach
from mtp_mlx.planning.grow import TreePolicy
from tests.decode.fakes import attached, random_adapter
from tests.tiny import VOCABULARY, tiny_model

PROMPT = [3, 1, 4, 1, 5, 9]
SAMPLINGS = [
    SamplingConfig(),
    SamplingConfig(repetition_penalty=1.3),
    SamplingConfig(temperature=0.8, seed=4),
    SamplingConfig(temperature=0.8, seed=4, top_p=0.9, logit_bias=((7, 2.0),)),
]


def quantised() -> AttachedModel:
    model = tiny_model("llama", seed=3, hidden_size=64, intermediate_size=96)
    nn.quantize(model, group_size=32, bits=8)
    return attach(model, random_adapter(model))


def policy(layout: str) -> Any:
    return TreePolicy(12, 4, [], places_slots=True) if layout == "tree" else FixedPolicy("linear", 4)


def text(model: AttachedModel, sampling: SamplingConfig, layout: str | None) -> list[int]:
    chosen = policy(layout) if layout else None
    return [
        item.token
        for item in mtp_generate_step(PROMPT, model, max_tokens=25, sampling=sampling, policy=chosen)
    ]


@pytest.fixture
def pairs(monkeypatch: pytest.MonkeyPatch) -> list[tuple[LazyDrafts, LazyDrafts]]:
    """Collects what every step drafts, with shortlists and without."""
    found: list[tuple[LazyDrafts, LazyDrafts]] = []
    propose = MaskSlotDrafter.propose

    def both(self: MaskSlotDrafter, verified: Verified) -> LazyDrafts:
        drafts, layer = propose(self, verified), self._layer
        assert layer is not None
        self._layer = None
        found.append((drafts, propose(self, verified)))
        self._layer = layer
        return drafts

    monkeypatch.setattr(MaskSlotDrafter, "propose", both)
    monkeypatch.setattr(module, "WORTH", 1)
    return found


@pytest.mark.parametrize("layout", ["linear", "tree"])
@pytest.mark.parametrize("sampling", SAMPLINGS)
@pytest.mark.parametrize("build", [lambda: attached("llama"), quantised])
def test_with_every_token_listed_drafts_are_those_of_the_whole_vocabulary(
    build: Any, sampling: SamplingConfig, layout: str, pairs: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "TOKENS", VOCABULARY)
    text(build(), sampling, layout)
    drafted = [(listed, whole) for listed, whole in pairs if listed.ids.size]
    assert len(drafted) > 5
    for listed, whole in drafted:
        possible = np.array(whole.confidences) > 0  # the others, which top-p drops, have no order
        np.testing.assert_array_equal(np.array(listed.ids)[possible], np.array(whole.ids)[possible])
        np.testing.assert_allclose(
            np.array(listed.confidences), np.array(whole.confidences), rtol=1e-3, atol=1e-6
        )


@pytest.mark.parametrize("layout", ["linear", "tree"])
@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_few_tokens_listed_change_drafts_but_not_the_text(
    sampling: SamplingConfig, layout: str, pairs: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "TOKENS", 5)
    model = attached("llama")
    assert text(model, sampling, layout) == text(model, sampling, None)
    assert any(listed.ids.tolist() != whole.ids.tolist() for listed, whole in pairs)


@pytest.mark.parametrize("layout", ["linear", "tree"])
@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_few_tokens_are_the_right_ones_and_their_chances_are_among_all(
    temperature: float, layout: str, pairs: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a sampler head that changes nothing, the likeliest few are those that the whole vocabulary gives."""
    monkeypatch.setattr(module, "TOKENS", 12)
    monkeypatch.setattr(SamplerHead, "__call__", lambda _, previous, hidden: hidden)
    text(attached("llama"), SamplingConfig(temperature=temperature, seed=4), layout)
    drafted = [(listed, whole) for listed, whole in pairs if listed.ids.size]
    assert len(drafted) > 5
    for listed, whole in drafted:
        assert listed.ids.tolist() == whole.ids.tolist()
        if (
            layout == "tree" or not temperature
        ):  # in a sampled chain, the share is an estimate: it has the noise
            np.testing.assert_allclose(np.array(listed.confidences), np.array(whole.confidences), rtol=1e-3)


def test_a_shortlist_is_the_likeliest_tokens_and_their_share() -> None:
    model = attached("llama")
    vocabulary = model.draft_vocabulary
    latents = mx.array(np.random.default_rng(0).normal(size=(3, 48)).astype(np.float32))
    probabilities = np.array(mx.softmax(vocabulary.head(latents[None])[0], axis=-1))  # [3, V]
    layer = model.whole_vocabulary.head.matrix
    assert layer is not None
    listed = module.shortlist(latents, mx.arange(3), None, layer, vocabulary, Picker())
    n = min(module.TOKENS, VOCABULARY)
    order = np.argsort(-probabilities, axis=-1)[:, :n]
    assert np.array(listed.ids).tolist() == order.tolist()
    np.testing.assert_allclose(
        np.array(listed.shares), np.take_along_axis(probabilities, order, -1).sum(-1), rtol=1e-5
    )
    found = np.array(listed.logits(1, latents[1][None]))[0]
    np.testing.assert_allclose(
        found, np.array(vocabulary.head(latents[1][None, None]))[0, 0, order[1]], rtol=1e-4
    )


@pytest.mark.parametrize(
    ("architecture", "sampling", "worth"),
    [
        ("llama", SamplingConfig(), 16),
        ("llama", SamplingConfig(temperature=0.7, noise="inverse-cdf"), 0),
        ("gemma2", SamplingConfig(), 0),
    ],
)
def test_all_tokens_are_scored_where_all_count(
    architecture: str, sampling: SamplingConfig, worth: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A small vocabulary, the inverse CDF, logits that are capped."""
    monkeypatch.setattr(module, "WORTH", worth)
    model = attached(architecture)
    words = (model.whole_vocabulary, model.draft_vocabulary)
    assert module.layer_of_shortlists(*words, Picker(sampling)) is None
    monkeypatch.setattr(module, "WORTH", 0)
    words = (attached("llama").whole_vocabulary, attached("llama").draft_vocabulary)
    assert module.layer_of_shortlists(*words, Picker()) is not None
