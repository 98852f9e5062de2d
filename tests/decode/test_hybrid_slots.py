"""Slots in models with recurrent layers: the text is the same in the linear layout, and other layouts are refused."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import pytest
from mlx_lm.generate import generate_step

from mtp_mlx.decode.emission import Emission
from mtp_mlx.decode.loop import mtp_generate_step
from mtp_mlx.decode.pick import SamplingConfig
from mtp_mlx.decode.policy import FixedPolicy, Proposal
from mtp_mlx.decode.stats import DecodeStats
from mtp_mlx.errors import MTPError
from mtp_mlx.measure.tune import candidates
from mtp_mlx.model.attach import attach
from mtp_mlx.planning.choose import build_policy, layout_in_use, tree_policy
from mtp_mlx.planning.cost import StepCost
from tests.decode.fakes import MOST_SLOTS, KnowingDrafter, attached, drafting, untouched
from tests.drafters.ptp.ptp_fakes import ptp_attached, ptp_drafting
from tests.tiny import tiny_model

# Of Granite's layers with attention, those of released hybrids have no rotary embeddings; Nemotron-H's never have.
WITH_SLOTS: dict[str, dict[str, Any]] = {name: {} for name in ("qwen3_5", "qwen3_next", "lfm2", "nemotron_h")}
WITH_SLOTS["granitemoehybrid"] = {"position_embedding_type": "nope"}


@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize("name", WITH_SLOTS)
def test_slots_behind_the_last_draft(name: str, temperature: float) -> None:
    """They go with the rejected drafts, with rotary embeddings in the attention layers or without."""
    prompt, options = [3, 5, 7, 11, 90, 2, 4, 8, 9], {"max_tokens": 30}
    model = attached(name, **WITH_SLOTS[name])
    if temperature:
        sampling = SamplingConfig(temperature=temperature, seed=5)
        plain = attach(tiny_model(name, seed=3, **WITH_SLOTS[name]))
        truth = [item.token for item in mtp_generate_step(prompt, plain, sampling=sampling, **options)]
    else:
        sampling, theirs = None, untouched(name, **WITH_SLOTS[name])
        truth = [int(token) for token, _ in generate_step(mx.array(prompt), theirs, **options)]
    stats = DecodeStats()
    with drafting(KnowingDrafter(truth, len(prompt), 0.7, 1)):
        policy = FixedPolicy("linear", MOST_SLOTS)
        found = mtp_generate_step(prompt, model, policy=policy, sampling=sampling, stats=stats, **options)
        assert [item.token for item in found] == truth
    assert 8 < sum(stats.accepted) < sum(stats.submitted) and "0/4" in stats.layouts
    own = mtp_generate_step(
        prompt, model, policy=policy, sampling=sampling, **options
    )  # what its slots draft
    assert [item.token for item in own] == truth


@pytest.mark.parametrize("variant", ["o", "c"])
@pytest.mark.parametrize("name", ["qwen3_next", "nemotron_h"])
def test_slots_that_carry_uniforms(name: str, variant: str) -> None:
    """Parallel Token Prediction: a slot that draft nothing comes first, at the position of the last draft."""
    prompt, options = [3, 5, 7, 11, 90, 2], {"sampling": SamplingConfig(0.8, seed=5, noise="inverse-cdf")}
    plain = attach(tiny_model(name, seed=3))
    truth = [item.token for item in mtp_generate_step(prompt, plain, max_tokens=24, **options)]
    model, stats, policy = ptp_attached(name, variant, "bits"), DecodeStats(), FixedPolicy("linear", 3)
    with ptp_drafting(truth, len(prompt), 0.7, 1):
        found = mtp_generate_step(prompt, model, policy=policy, stats=stats, max_tokens=24, **options)
        assert [item.token for item in found] == truth
    assert sum(stats.accepted) > 5


def test_unverified_passes_leave_no_slot_in_the_state() -> None:
    """With tau 1 every pass gives one token, and the text is mlx-lm's; without, several tokens."""
    prompt, theirs = [3, 5, 7, 11, 90, 2], untouched("qwen3_next")
    truth = [int(token) for token, _ in generate_step(mx.array(prompt), theirs, max_tokens=20)]
    policy = FixedPolicy("linear", 3)
    for emission, passes in ((Emission("conf-adapt", 1.0), 20), (Emission("static"), 5)):
        stats = DecodeStats()
        found = mtp_generate_step(
            prompt, attached("qwen3_next"), policy=policy, emission=emission, stats=stats, max_tokens=20
        )
        tokens = [item.token for item in found]
        assert stats.steps == passes and (tokens == truth or emission.name == "static")


def test_auto_with_a_tau_is_the_linear_layout_also_by_name() -> None:
    model, stats, emission = attached("qwen3_next"), DecodeStats(), Emission("verified", 0.3)
    build_policy(model, "auto", 2, stats, emission)
    assert list(stats.fallbacks) == ["linear layout: this model's recurrent state reads every row of a pass"]
    assert emission.label(layout_in_use(model, "auto", emission)) == "linear tau 0.3"
    assert emission.label(layout_in_use(attached("qwen3"), "auto", emission)) == "quadratic tau 0.3"
    assert (
        layout_in_use(model, "auto", Emission()) == layout_in_use(model, "auto", Emission("static")) == "auto"
    )


def test_slots_behind_several_rows_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the loop, and before it; auto plans the linear layout, and says so once."""
    model, stats = attached("qwen3_next"), DecodeStats()
    with pytest.raises(MTPError, match="recurrent state reads every row of a pass: use the linear layout"):
        list(mtp_generate_step([3, 5], model, policy=FixedPolicy("quadratic", 2), max_tokens=9))
    for refused in (lambda: build_policy(model, "quadratic", 2, stats), lambda: tree_policy(model, 2, 8)):
        with pytest.raises(MTPError, match=r"slots behind several rows, and this model's recurrent state"):
            refused()
    cost = StepCost((1, 40), (1, 64), (1.0, 1.5), (1.0, 1.5), (1,), (0.0,), 0.0, (1.0, 1.0))
    monkeypatch.setattr("mtp_mlx.planning.choose.step_cost", lambda model: cost)
    policy = build_policy(model, "auto", None, stats)
    policy.begin(9, branches=False)
    _, layout = policy.choose([Proposal.chain("slots", [4, 5, 6], [0.6, 0.6, 0.6])])
    assert layout.drafts and layout.slots[-1] and not any(layout.slots[:-1])
    assert list(stats.fallbacks) == [
        "slots behind the last draft only: this model's recurrent state reads every row of a pass"
    ]
    assert all(lane.layout not in ("quadratic", "tree") for lane in candidates(model))
