"""Candidates of every drafter in trees: the text stays the same, and what is drafted behind a branch is right."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import pytest

from mtp_mlx.decode.drafter import LazyDrafts
from mtp_mlx.decode.layout import Layout
from mtp_mlx.decode.loop import mtp_generate_step
from mtp_mlx.decode.pick import SamplingConfig
from mtp_mlx.decode.policy import Proposal
from mtp_mlx.decode.stats import DecodeStats
from mtp_mlx.decode.tree import ROOT
from mtp_mlx.drafters.draft_model.source import DraftModel
from mtp_mlx.model.attach import AttachedModel, attach
from mtp_mlx.planning.grow import TreePolicy
from tests.decode.fakes import attached
from tests.decode.test_hybrid_loop import KnowingLookup
from tests.decode.trees import AnyTree
from tests.drafters.heads.test_chain import model_with_heads
from tests.drafters.heads.test_independent import model_with
from tests.drafters.ptp.ptp_fakes import ptp_attached
from tests.tiny import VOCABULARY, tiny_model

PROMPT = [3, 1, 4, 1, 5, 9]
MODELS: dict[str, Any] = {
    "slots": lambda: attached("llama"),
    "ptp": lambda: ptp_attached("llama", "c", "bits"),
    "one-hot ptp": lambda: ptp_attached("llama", "o", "bits"),
    "heads": lambda: model_with_heads("llama", 3, 3),
    "medusa": lambda: model_with("medusa, few ids"),
    "parallel": lambda: model_with("parallel"),
    "draft model": lambda: attach(
        tiny_model("llama", seed=3), DraftModel(tiny_model("llama", seed=9), VOCABULARY, 4)
    ),
}


def tree_policy(model: AttachedModel, rows: int) -> TreePolicy:
    source: Any = model.speculator
    return TreePolicy(rows, source.drafts, [], places_slots=source.places_slots, lead=model.lead)


@pytest.mark.parametrize("penalty", [1.0, 1.3])
@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize("name", MODELS)
def test_the_text_is_that_of_plain_decoding(name: str, temperature: float, penalty: float) -> None:
    """The one-hot slots, untrained, hardly prefer any token: of their drafts any part is verified."""
    model, stats, said = MODELS[name](), DecodeStats(), Counter[str]()
    for seed, rows in ((0, 6), (1, 12), (2, 20)):
        sampling = SamplingConfig(temperature=temperature, seed=seed, repetition_penalty=penalty)
        plain = [i.token for i in mtp_generate_step(PROMPT, model, max_tokens=25, sampling=sampling)]
        steps = mtp_generate_step(
            PROMPT,
            model,
            max_tokens=25,
            sampling=sampling,
            policy=AnyTree(4, seed) if name == "one-hot ptp" else tree_policy(model, rows),
            lookup=KnowingLookup(plain, len(PROMPT), (False, True, False)),
            stats=stats,
        )
        items = list(steps)
        assert [item.token for item in items] == plain
        said.update(item.drafter for item in items if item.from_draft)
        assert all(bool(item.drafter) == item.from_draft for item in items)
    assert said == stats.drafted_by
    assert all((item.choice > 0) == item.from_draft for item in items)
    assert stats.choices.total() == sum(stats.accepted)
    assert any(layout.startswith("tree") for layout in stats.layouts)
    assert not any("branches" in reason for reason in stats.fallbacks)
    assert stats.drafted_by["lookup"] > 10
    assert stats.submitted_by["lookup"] < sum(stats.submitted_by.values())


class Watching(TreePolicy):
    """A tree policy that keeps the trees that the model's own drafter proposes."""

    def choose(self, proposals: Sequence[Proposal]) -> tuple[Proposal, Layout]:
        """See `Policy`."""
        self.trees = [*getattr(self, "trees", []), proposals[0].tree]
        return super().choose(proposals)


@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize("name", ["ptp", "one-hot ptp", "medusa", "parallel"])
def test_drafts_follow_every_candidate_and_share_their_position_s_own(name: str, temperature: float) -> None:
    """Also of drafters that score a position once, whatever stands before it."""
    model = MODELS[name]()
    source: Any = model.speculator
    policy = Watching(12, source.drafts, [], places_slots=source.places_slots, lead=model.lead)
    sampling = SamplingConfig(temperature=temperature, seed=3)
    list(mtp_generate_step(PROMPT, model, max_tokens=25, sampling=sampling, policy=policy))
    trees, followed = policy.trees, 0
    for tree in trees:
        followed += sum(not tree.first_choices[parent] for parent in set(tree.parents) - {ROOT})
        for depth in set(tree.depths):
            here = [node for node in range(len(tree)) if tree.depths[node] == depth]
            assert len({tree.tokens[node] for node in here}) <= len(here) <= policy._width
    assert followed > len(trees) / 2


@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_a_model_that_drafts_for_itself_is_right_behind_any_branch(temperature: float) -> None:
    """Its first candidates are the target's own tokens: a wrong sibling beside them changes nothing."""
    model = attach(tiny_model("llama", seed=3), DraftModel(tiny_model("llama", seed=3), VOCABULARY, 4))
    stats = DecodeStats()
    sampling = SamplingConfig(temperature=temperature, seed=11)
    steps = mtp_generate_step(
        PROMPT, model, max_tokens=31, sampling=sampling, policy=tree_policy(model, 24), stats=stats
    )
    assert len(list(steps)) == 31
    assert stats.acceptance == [1.0] * 4 and stats.steps < 20
    assert any(layout.startswith("tree") for layout in stats.layouts)


def test_what_stands_beside_the_first_candidates_has_their_parent() -> None:
    ids = [mx.array([5, 6, 7]), mx.array([8, 9, 1])]
    found = LazyDrafts.joined(ids, [mx.full((3,), 0.3)] * 2)
    assert found.ids.tolist() == [5, 6, 7, 8, 9, 1] and found.parents is not None
    assert found.parents.tolist() == [-1, -1, -1, 0, 0, 0]
    assert LazyDrafts.joined([mx.array([5]), mx.array([8])], [mx.full((1,), 0.3)] * 2).parents is None
