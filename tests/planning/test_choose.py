"""--drafter: who drafts, that the text's drafts go first where it has a match, and that the text stays the same."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import pytest
from mlx_lm.generate import generate_step

from mtp_mlx.decode.layout import Layout
from mtp_mlx.decode.lookup import LookupDrafter
from mtp_mlx.decode.loop import mtp_generate_step
from mtp_mlx.decode.pick import SamplingConfig
from mtp_mlx.decode.policy import ChainPolicy, FixedPolicy, LookupPolicy, Proposal
from mtp_mlx.decode.stats import DecodeStats
from mtp_mlx.errors import MTPError
from mtp_mlx.model.attach import AttachedModel, attach
from mtp_mlx.planning.budget import BudgetPolicy
from mtp_mlx.planning.choose import DrafterChoice, choose_drafters, lookup_policy, plan_drafting
from tests.decode.fakes import attached as with_slots
from tests.decode.fakes import untouched
from tests.decode.test_hybrid_loop import with_heads
from tests.drafters.heads.test_chain import model_with_heads
from tests.drafters.heads.test_mtp_head import random_heads
from tests.planning.test_budget import cost_of
from tests.tiny import tiny_model

PROMPT = [3, 5, 7, 3, 5, 7, 3, 5]
OWN, TEXT = Proposal.chain("heads", [1, 2, 3, 4], [0.9] * 4), Proposal.chain("lookup", [7, 8], [0.5] * 2)


def bare(architecture: str = "llama") -> AttachedModel:
    """A model without any adapter."""
    return attach(tiny_model(architecture, seed=3))


def test_names() -> None:
    heads, slots = model_with_heads("llama", 2, 2), with_slots("llama")
    for model, name, expected in [
        (heads, "heads", DrafterChoice(True, False)),
        (heads, "heads,lookup", DrafterChoice(True, True)),
        (heads, "lookup , heads", DrafterChoice(True, True)),
        (slots, "slots,lookup", DrafterChoice(True, True)),
        (slots, "lookup", DrafterChoice(False, True)),
    ]:
        assert choose_drafters(model, name, None, "linear") == expected
    assert choose_drafters(slots, None, None, "auto") == DrafterChoice(True, True)
    assert choose_drafters(slots, None, None, "linear") == DrafterChoice(True, False)
    assert choose_drafters(slots, None, True, "linear") == DrafterChoice(True, True)


@pytest.mark.parametrize(
    ("name", "lookup", "message"),
    [
        ("heads", None, "drafter 'heads' needs MTP heads"),
        ("lookup,slots", None, "drafter 'slots' needs an adapter with slots"),
        (
            "medusa",
            None,
            "unknown drafter 'medusa': choose from slots, heads, draft-model, assistant, memory, lookup",
        ),
        ("", None, "unknown drafter ''"),
        ("lookup", True, "leave `lookup` out"),
    ],
)
def test_names_that_do_not_go(name: str, lookup: bool | None, message: str) -> None:
    with pytest.raises(MTPError, match=message):
        choose_drafters(bare(), name, lookup, "auto")


def test_policies_of_lookup_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mtp_mlx.planning.choose.step_cost", lambda model: cost_of(0.1))
    model = bare()
    assert lookup_policy(model, "linear", None).max_drafts == 8
    assert lookup_policy(model, "linear", 3).max_drafts == 3
    assert isinstance(lookup_policy(model, "plain", None), FixedPolicy)
    assert isinstance(lookup_policy(model, "auto", None), BudgetPolicy)
    for layout, drafts, message in [
        ("quadratic", None, "drafter 'lookup'"),
        ("linear", 17, "must be 1 to 16; got 17"),
        ("cubic", None, "unknown layout 'cubic'"),
    ]:
        with pytest.raises(MTPError, match=message):
            lookup_policy(model, layout, drafts)  # type: ignore[arg-type]


def test_lookup_alone_does_not_forget_what_the_adapter_records(monkeypatch: pytest.MonkeyPatch) -> None:
    """The experience it begins is that of later generations, which draft with the heads."""
    monkeypatch.setattr("mtp_mlx.planning.choose.step_cost", lambda model: cost_of(0.1))
    base = tiny_model("llama", seed=3)
    model = attach(base, random_heads(base, 2))
    model.info = SimpleNamespace(acceptance=[0.9, 0.4], acceptance_by_precision={})
    lookup_policy(model, "auto", None)
    assert model.experience.acceptance["heads"].summary()[:2] == pytest.approx([0.9, 0.4])


def test_a_match_goes_first() -> None:
    for policy in (ChainPolicy(4), FixedPolicy("linear", 4), LookupPolicy(4)):
        assert policy.choose([OWN, TEXT])[0] == TEXT
        assert policy.choose([OWN])[0].source == "heads"
        assert policy.choose([OWN, Proposal.chain("lookup", [], [])])[0].source == "heads"
    assert ChainPolicy(4).choose([OWN, TEXT])[1] == Layout.chained(2, 4)
    assert LookupPolicy(4).choose([OWN, TEXT])[1] == Layout(2, (0, 0, 0))
    assert LookupPolicy(4).choose([Proposal.chain("slots", [], [])])[1] == Layout.plain()


def drafted(model: AttachedModel, policy: Any, temperature: float = 0.0) -> tuple[list[int], DecodeStats]:
    stats = DecodeStats()
    items = mtp_generate_step(
        PROMPT,
        model,
        max_tokens=40,
        policy=policy,
        lookup=LookupDrafter(3, 1),
        stats=stats,
        sampling=SamplingConfig(temperature=temperature, seed=4),
    )
    return [item.token for item in items], stats


@pytest.mark.parametrize("architecture", ["llama", "gemma3_text", "qwen3_next", "nemotron_h", "rwkv7"])
@pytest.mark.parametrize("temperature", [0.0, 0.6])
def test_lookup_alone_with_any_model(architecture: str, temperature: float) -> None:
    model = bare(architecture)
    if temperature:
        plain = mtp_generate_step(
            PROMPT, model, max_tokens=40, sampling=SamplingConfig(temperature=temperature, seed=4)
        )
        expected = [item.token for item in plain]
    else:
        theirs = generate_step(mx.array(PROMPT), untouched(architecture), max_tokens=40)
        expected = [int(token) for token, _ in theirs]
    found, stats = drafted(model, lookup_policy(model, "linear", 4), temperature)
    assert found == expected
    assert (
        set(stats.submitted_by) == {"lookup"} and stats.submitted_by["lookup"] >= stats.drafted_by["lookup"]
    )


@pytest.mark.parametrize("architecture", ["llama", "qwen3_next"])
def test_heads_with_lookup(architecture: str) -> None:
    """Both draft in one text, and are counted apart."""
    model = with_heads(architecture, 2)
    found, stats = drafted(model, ChainPolicy(2))
    expected = [int(t) for t, _ in generate_step(mx.array(PROMPT), untouched(architecture), max_tokens=40)]
    assert found == expected
    assert stats.submitted_by["heads"] and stats.submitted_by["lookup"]
    assert stats.steps + sum(stats.drafted_by.values()) == 40


def test_lookup_alone_needs_no_adapter() -> None:
    """In a fixed layout; without lookup there would be nothing to draft with."""
    model = attach(tiny_model("llama", seed=3), None)
    assert plan_drafting(model, "linear", None, DecodeStats(), lookup=True).lookup is not None
    with pytest.raises(MTPError, match="needs an adapter"):
        plan_drafting(model, "linear", None, DecodeStats())
