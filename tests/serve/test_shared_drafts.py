"""Proves that sequences can share passes where each alone would decode plainly, and beside replaced attention."""

from __future__ import annotations

import pytest

from mtp_mlx.decode.loop import DecodeLoop, mtp_generate_step, open_loop
from mtp_mlx.decode.pick import SamplingConfig
from mtp_mlx.decode.policy import FixedPolicy
from mtp_mlx.decode.session import CacheSettings, Session
from mtp_mlx.decode.stats import DecodeStats
from mtp_mlx.model.attach import AttachedModel, attach
from mtp_mlx.serve.batch import Batch, why_not_batch
from mtp_mlx.serve.batch_plan import BatchDrafting, BatchPlan
from tests.decode.fakes import attached
from tests.drafters.heads.test_chain import model_with_heads
from tests.tiny import tiny_model

PROMPTS = ([3, 1, 4, 1, 5], [2, 7, 1])


def opened(model: AttachedModel, prompt: list[int], shared: int) -> tuple[Session, DecodeLoop, DecodeStats]:
    """A sequence whose own policy is plain decoding; its prompt has run."""
    stats = DecodeStats()
    session, loop = open_loop(
        prompt,
        model,
        max_tokens=24,
        sampling=SamplingConfig(),
        policy=FixedPolicy("plain", 0),
        lookup=None,
        emission=None,
        cache=model.make_cache(),
        settings=CacheSettings(),
        stats=stats,
        constraint=None,
        shared_drafts=shared,
    )
    session.prefill()
    assert isinstance(loop, DecodeLoop)
    return session, loop, stats


@pytest.mark.parametrize("kind", ["slots", "heads"])
def test_plain_sequences_draft_where_they_share_passes(kind: str) -> None:
    model = attached("qwen3") if kind == "slots" else model_with_heads("qwen3", 2, 2)
    form = {"slots": 2} if kind == "slots" else {"chain": 2}
    plan = BatchPlan(BatchDrafting("linear", own=kind, **form))  # type: ignore[arg-type]
    assert plan.own_drafts == 2
    batch, told = Batch(model, plan), []
    members = [opened(model, list(prompt), batch.own_drafts) for prompt in PROMPTS]
    for session, loop, _ in members:
        batch.join(session, loop)
        told.append([])
    while min(map(len, told)) < 8:
        for own, tokens in zip(told, batch.step(), strict=True):
            own += [token.token for token in tokens]
    for prompt, own, (_, _, stats) in zip(PROMPTS, told, members, strict=True):
        plain = mtp_generate_step(prompt, model, max_tokens=len(own))
        assert own == [token.token for token in plain]
        assert stats.submitted_by[kind] > 0


def test_sequences_share_passes_beside_a_model_whose_attention_is_replaced() -> None:
    """An exact model replaces the attention function of its architecture for as long as it lives."""
    exact = attach(tiny_model("llama", seed=4), exact=True)
    assert why_not_batch(attach(tiny_model("llama", seed=3))) == ""
    exact.detach()
