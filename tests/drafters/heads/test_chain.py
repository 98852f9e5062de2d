"""Proves that the chain of heads computes, step by step with caches, what the cascade computes from scratch.

Whatever is accepted or rejected, however the prompt is cut and whichever steps draft: what draft k is picked from
equals row m of head k of `MTPHeads.cascade` over the committed text and the fresh drafts before it.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any
from unittest import mock

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mtp_mlx.decode.draft_pick import pick_draft
from mtp_mlx.decode.pick import Picker, SamplingConfig
from mtp_mlx.decode.tree import DraftTree
from mtp_mlx.drafters.heads.cascade import MTPHeads
from mtp_mlx.drafters.heads.chain import HeadChain
from mtp_mlx.drafters.heads.convention import HeadConvention
from mtp_mlx.model.attach import AttachedModel, attach
from tests.drafters.heads.blocks import verified_block
from tests.drafters.heads.test_mtp_head import random_heads
from tests.tiny import VOCABULARY, tiny_model

CONVENTIONS = [
    HeadConvention("test"),
    HeadConvention("test", recycled_hidden="raw", mask_first_position=True),
    HeadConvention("test", recycled_hidden="trunk"),
    HeadConvention("test", lm_head="own"),  # and a window, see `model_with_heads`
]
WINDOW = 5
# Layers of a head, and layers of the trunk that the first head reads.
SHAPES: list[tuple[int, tuple[int, ...]]] = [(1, ()), (2, ()), (1, (1, 2)), (2, (1,))]
MODELS: dict[Any, AttachedModel] = {}


def model_with_heads(
    architecture: str,
    heads: int,
    drafts: int,
    convention: int = 0,
    draft_ids: mx.array | None = None,
    shape: int = 0,
) -> AttachedModel:
    """A tiny model with random heads; shared."""
    key = (architecture, heads, drafts, convention, shape)
    if draft_ids is not None or key not in MODELS:
        model, (layers, taps) = tiny_model(architecture, seed=3), SHAPES[shape]
        made = random_heads(model, heads, CONVENTIONS[convention], layers=layers, taps=taps)
        for head in made.heads:
            head.window = WINDOW if CONVENTIONS[convention].lm_head == "own" else None
        fusion = made.get("fusion")
        attached = attach(model, MTPHeads(made.heads, CONVENTIONS[convention], draft_ids, drafts, fusion))
        if draft_ids is not None:
            return attached
        MODELS[key] = attached
    return MODELS[key]


def opened(attached: AttachedModel, picker: Picker, first_position: int = 0) -> HeadChain:
    """The chain of a generation that drafts as many tokens as the heads are set to."""
    heads = attached.speculator
    assert isinstance(heads, MTPHeads)
    return heads.open(attached, picker, heads.drafts, first_position)


class Text:
    """A known text with hidden states of a trunk, and the chain going over it."""

    def __init__(self, attached: AttachedModel, first_position: int = 0, seed: int = 0) -> None:
        rng = np.random.default_rng(seed)
        self.tokens = rng.integers(0, VOCABULARY, 80).tolist()
        self.hidden = mx.array(rng.normal(size=(1, 80, attached.head_input_size)).astype(np.float32))
        self.attached, self.rng, self.n = attached, rng, 0
        self.picker = Picker(SamplingConfig(temperature=0.8, seed=seed))
        self.chain = opened(attached, self.picker, first_position)
        self.first_position = first_position

    def run(self, rows: int, known: int) -> None:
        """Trunk rows without drafting, when the first `known` tokens are known."""
        self.chain.observe(self.hidden[:, self.n : self.n + rows], self.tokens[:known])
        self.n += rows

    def step(self, drafts: int, accepted: int, count: int) -> None:
        """A block of which `accepted` drafts are accepted; checks the drafts that follow."""
        m = self.n + accepted
        garbage = self.rng.normal(size=(1, drafts - accepted, self.hidden.shape[-1])).astype(np.float32)
        block = mx.concatenate([self.hidden[:, self.n : m + 1], mx.array(garbage)], axis=1)
        wrong = self.rng.integers(0, VOCABULARY, drafts - accepted).tolist()
        picks = mx.array([*self.tokens[self.n + 1 : m + 2], *wrong], dtype=mx.int32)
        picked_from: list[mx.array] = []

        def spy(attached: Any, picker: Any, refined: mx.array, *rest: Any) -> Any:
            picked_from.append(refined)
            return pick_draft(attached, picker, refined, *rest)

        with mock.patch("mtp_mlx.drafters.heads.chain.pick_draft", spy):
            position, known = self.first_position + m + 1, self.tokens[: self.n + 1]
            fresh = self.chain.propose(verified_block(block, picks, accepted, position, known, count))
        self.chain.commit(accepted)
        self.n = m + 1
        assert fresh.ids.shape == fresh.confidences.shape == (count,)
        self._check(m, fresh.ids.tolist(), picked_from)  # type: ignore[arg-type]

    def _check(self, m: int, ids: list[int], picked_from: list[mx.array]) -> None:
        heads = self.attached.speculator
        assert isinstance(heads, MTPHeads)
        text = mx.array([self.tokens[: m + 2] + ids])
        hidden = mx.concatenate(
            [self.hidden[:, : m + 1], self.hidden[:, : text.shape[1] - m - 1] * 0], axis=1
        )
        convention = heads.convention
        if self.first_position:  # row 0 is not the text's first
            convention = replace(convention, mask_first_position=False)
        with mock.patch.object(heads, "_convention", convention):
            expected = heads.cascade(self.attached.embed(text), hidden, len(ids))
        # With several layers a head, rounding grows by another factor of ten at each depth.
        close = 1e-3 if len(heads.heads[0].layers) == 1 else 3e-2
        for depth, (found, z) in enumerate(zip(picked_from, expected, strict=True), start=1):
            np.testing.assert_allclose(np.array(found[0]), np.array(z[0, m]), rtol=close, atol=close)
            position = mx.array([self.first_position + m + 1 + depth])
            own = heads.unembedding(depth)
            unembed = self.attached.draft_head if own is None else own
            pick = self.picker.pick(unembed(found), position, None, self.attached.draft_ids)
            assert pick.item() == ids[depth - 1]


@st.composite
def journeys(draw: Any) -> dict[str, Any]:
    """A prompt cut in chunks, then steps: ("plain", rows) or (drafts, accepted, count of fresh drafts)."""
    heads = draw(st.integers(1, 4))
    drafts = draw(st.sampled_from([heads, heads, 3, 5]))
    actions: list[Any] = []
    for _ in range(draw(st.integers(1, 8))):
        if draw(st.integers(0, 3)) == 0:
            actions.append(("plain", draw(st.integers(1, 3))))
        else:
            block = draw(st.integers(0, 5))
            count = draw(st.sampled_from([drafts, drafts, draw(st.integers(1, drafts))]))
            actions.append((block, draw(st.integers(0, block)), count))
    return {
        "architecture": draw(st.sampled_from(["llama", "qwen3"])),
        "heads": heads,
        "drafts": drafts,
        "convention": draw(st.integers(0, len(CONVENTIONS) - 1)),
        "shape": draw(st.integers(0, len(SHAPES) - 1)),
        "chunks": draw(st.lists(st.integers(1, 7), max_size=3)),
        "catch_up_at": draw(st.sampled_from([1, 2, 5, 256])),
        "actions": actions,
        "seed": draw(st.integers(0, 1000)),
    }


@settings(
    max_examples=120,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.too_slow],
)
@given(journeys())
def test_step_by_step_equals_from_scratch(journey: dict[str, Any]) -> None:
    """The law of the chain."""
    attached = model_with_heads(
        journey["architecture"],
        journey["heads"],
        journey["drafts"],
        journey["convention"],
        shape=journey["shape"],
    )
    text = Text(attached, seed=journey["seed"])
    with mock.patch("mtp_mlx.drafters.heads.chain.CATCH_UP_AT", journey["catch_up_at"]):
        prompt = sum(journey["chunks"]) + 1
        for rows in journey["chunks"]:
            text.run(rows, prompt)
        for action in journey["actions"]:
            if action[0] == "plain":
                for _ in range(action[1]):  # one pass ahead of what the host has read
                    text.run(1, text.n + 1)
            else:
                text.step(*action)


def likeliest(text: Text, m: int, count: int, width: int) -> list[tuple[tuple[int, ...], float]]:
    """Paths of drafts behind row m and the chance of the last of each, by `MTPHeads.cascade` for every path."""
    heads = text.attached.speculator
    assert isinstance(heads, MTPHeads)
    found: list[tuple[tuple[int, ...], float]] = []
    paths = [((), 1.0)]
    for depth in range(1, count + 1):
        longer = []
        for path, chance in paths:
            ids = mx.array([[*text.tokens[: m + 2], *path]])
            hidden = mx.concatenate([text.hidden[:, : m + 1], text.hidden[:, :depth] * 0], axis=1)
            refined = heads.cascade(text.attached.embed(ids), hidden, depth)[-1][0, m][None]
            position = mx.array([m + 1 + depth])
            tokens, sure = text.picker.candidates(
                heads.logits(text.attached, refined, depth), position, None, text.attached.draft_ids, width
            )
            longer += [
                ((*path, token), chance * one, one)
                for token, one in zip(tokens[0].tolist(), sure[0].tolist(), strict=True)  # type: ignore[arg-type,union-attr]
            ]
        longer = sorted(longer, key=lambda one: -one[1])[:width]
        paths = [(path, along) for path, along, _ in longer]
        found += [(path, sure) for path, _, sure in longer]
    return found


@pytest.mark.parametrize(("convention", "shape"), [(0, 0), (1, 0), (3, 2), (2, 1)])
def test_trees_follow_the_likeliest_paths(convention: int, shape: int) -> None:
    """Each node is drafted behind its own ancestors, as the cascade would; the steps after it go on as ever."""
    text, continued = Text(model_with_heads("llama", 3, 3, convention, shape=shape), seed=1), set[int]()
    text.run(5, 6)
    for drafts, accepted, width in ((2, 1, 3), (0, 0, 6), (3, 3, 4)):
        m = text.n + accepted
        rows = mx.concatenate([text.hidden[:, text.n : m + 1], text.hidden[:, : drafts - accepted]], axis=1)
        picks = mx.array([*text.tokens[text.n + 1 : m + 2], *[7] * (drafts - accepted)], dtype=mx.int32)
        seen = verified_block(rows, picks, accepted, m + 1, text.tokens[: text.n + 1], 3)
        fresh = text.chain.propose(replace(seen, layout=replace(seen.layout, width=width)))
        assert fresh.parents is not None
        tokens, parents = fresh.ids.tolist(), fresh.parents.tolist()
        tree = DraftTree(tuple(tokens), tuple(parents), tuple(fresh.confidences.tolist()))  # type: ignore[arg-type]
        expected = likeliest(text, m, 3, width)
        assert [tuple(tokens[one] for one in tree.path(node)) for node in range(len(tree))] == [  # type: ignore[index]
            path for path, _ in expected
        ]
        np.testing.assert_allclose(tree.chances, [chance for _, chance in expected], rtol=0.03, atol=1e-4)
        continued |= {parent % width for parent in parents if parent >= 0}  # type: ignore[union-attr,operator]
        text.chain.commit(accepted)
        text.n = m + 1
        text.step(2, 1, 3)  # a chain again
    assert len(continued) > 1


@pytest.mark.parametrize("shape", [0, 1])
def test_caches_hold_final_rows_only(shape: int) -> None:
    """Those of every layer."""
    text = Text(model_with_heads("llama", 3, 3, shape=shape))
    text.run(6, 7)
    text.chain.catch_up(text.tokens[:7])

    def rows() -> list[set[int]]:
        return [{layer.offset for layer in state.cache.layers} for state in text.chain._depths]

    assert rows() == [{6}, {5}, {4}]
    text.step(3, 1, 3)
    assert rows() == [{8}, {7}, {6}]
    text.step(3, 3, 1)
    assert rows() == [{12}, {7}, {6}]


def test_behind_a_prefix_that_the_heads_never_saw() -> None:
    """Rows count from the first that was run, and the first is not the text's first: nothing is masked."""
    attached = model_with_heads("llama", 2, 2, 1)
    text = Text(attached, first_position=20)
    text.run(4, 5)
    text.step(2, 1, 2)
    text.step(2, 2, 2)


@pytest.mark.parametrize("penalty", [1.0, 1.4])
def test_drafts_come_from_the_draft_vocabulary(penalty: float) -> None:
    ids = mx.array([7, 20, 33, 99, 140], dtype=mx.int32)
    attached = model_with_heads("llama", 3, 3, draft_ids=ids)
    picker = Picker(SamplingConfig(temperature=1.0, seed=5, repetition_penalty=penalty))
    chain = opened(attached, picker)
    hidden = mx.random.normal((1, 3, attached.hidden_size), key=mx.random.key(1))
    history = mx.array([-1] * 17 + [4, 5, 6], dtype=mx.int32) if penalty != 1 else None
    seen = verified_block(hidden, mx.array([5, 6, 8]), 1, 2, [4], 3)
    fresh = chain.propose(replace(seen, history=history))
    assert set(fresh.ids.tolist()) <= set(ids.tolist())  # type: ignore[arg-type]
    assert all(0 < value <= 1 for value in fresh.confidences.tolist())  # type: ignore[union-attr]
