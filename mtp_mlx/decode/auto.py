"""Builds the policy that a layout's name stands for."""

from __future__ import annotations

from mtp_mlx.decode.budget import BudgetPolicy, Experience
from mtp_mlx.decode.budget_heads import HeadsBudgetPolicy
from mtp_mlx.decode.calibrate import step_cost
from mtp_mlx.decode.emission import Emission
from mtp_mlx.decode.policy import ChainPolicy, ConfidencePolicy, FixedPolicy, LayoutName, Policy
from mtp_mlx.decode.stats import DecodeStats
from mtp_mlx.errors import MTPError
from mtp_mlx.model.attach import AttachedModel
from mtp_mlx.model.draft_heads import DraftHeads
from mtp_mlx.model.ptp_slots import PTPAdapter

MOST_CHAIN = 16  # drafts of a chain of heads; the heads are applied again in turn where they are fewer
LAYOUT_NAMES: tuple[LayoutName, ...] = ("auto", "linear", "quadratic", "plain")


def build_policy(
    model: AttachedModel,
    layout: LayoutName,
    slots: int | None,
    stats: DecodeStats,
    emission: Emission | None = None,
) -> Policy:
    """The policy for `layout`; `emission` with a tau narrows it, and unverified emission has a layout of its own.

    Raises:
        MTPError: an unknown layout, slots without an adapter, more slots than the adapter has, slot groups for
            MTP heads, or an emission that does not go with the model or the layout.
    """
    if layout not in LAYOUT_NAMES:
        raise MTPError(f"unknown layout '{layout}': choose one of {', '.join(LAYOUT_NAMES)}")
    emission = emission or Emission()
    if emission.threshold is not None or not emission.lossless:
        return _emission_policy(model, layout, slots, emission)
    if model.mtp_heads is not None:
        return _heads_policy(model, layout, slots, stats)
    most = _most_slots(model, slots)
    if layout in ("linear", "quadratic") and not most:
        raise MTPError(f"layout '{layout}' needs an adapter: give one with --adapter, or use --layout plain")
    if layout == "plain":
        return FixedPolicy("plain", 0)
    if layout == "auto":
        prior = recorded_acceptance(model)
        return BudgetPolicy(step_cost(model), slots or most, prior, experience=model.experience)
    return FixedPolicy(layout, slots or most)


def _most_slots(model: AttachedModel, slots: int | None) -> int:
    """Slots of the adapter, 0 without one; checks `slots` against them."""
    most = 0 if model.adapter is None else model.adapter.config.slots
    if slots is not None and not 1 <= slots <= most:
        raise MTPError(
            f"slots must be from 1 to {most}, the slots this adapter was trained with; got {slots}"
        )
    return most


def _emission_policy(
    model: AttachedModel, layout: LayoutName, slots: int | None, emission: Emission
) -> Policy:
    """The policy of verified emission with a tau, or the slots of unverified emission."""
    what = "verified with a tau" if emission.lossless else emission.name
    if model.adapter is None:
        raise MTPError(
            f"emission '{what}' needs an adapter with mask tokens: give one with --adapter, or leave --emit and "
            "--tau out"
        )
    if isinstance(model.adapter, PTPAdapter) and not emission.lossless:
        raise MTPError(
            f"emission '{what}' is for mask tokens, and this adapter's slots are of Parallel Token Prediction: "
            "use --emit verified"
        )
    most = _most_slots(model, slots)
    if layout == "plain" or (layout == "quadratic" and not emission.lossless):
        raise MTPError(f"emission '{what}' does not go with layout '{layout}': drop one of them")
    if not emission.lossless:
        return FixedPolicy("linear", slots or most)
    assert emission.threshold is not None
    fixed = FixedPolicy("linear" if layout == "linear" else "quadratic", slots or most)
    return ConfidencePolicy(fixed, emission.threshold)


def _heads_policy(model: AttachedModel, layout: LayoutName, slots: int | None, stats: DecodeStats) -> Policy:
    """The policy of a model with MTP heads; `slots` is then the number of drafts in each step."""
    if layout == "quadratic":
        raise MTPError(
            "layout 'quadratic' places groups of mask slots, which MTP heads do not need: they draft after every "
            "outcome; use --layout linear, auto or plain"
        )
    assert model.mtp_heads is not None
    most = _most_chain(model.mtp_heads)
    if slots is not None and not 1 <= slots <= most:
        raise MTPError(f"with these MTP heads, slots are drafts in each step, from 1 to {most}; got {slots}")
    if layout == "plain":
        return FixedPolicy("plain", 0)
    chain = slots or model.most_drafts
    count = len(model.mtp_heads.heads)
    if chain > count:
        stats.looped = f"{count} heads to {chain} drafts"
    if layout == "auto":
        prior = recorded_acceptance(model)
        return HeadsBudgetPolicy(step_cost(model), chain, prior, experience=model.experience)
    return ChainPolicy(chain)


def _most_chain(heads: DraftHeads) -> int:
    """Most drafts that a generation can ask of these heads in a step."""
    return heads.most_drafts or MOST_CHAIN


def recorded_acceptance(model: AttachedModel) -> list[float]:
    """Acceptance per depth that the adapter records; gives a model without any an experience to go on from.

    The experience goes on to generations that ask for more drafts than this one, so it has room for the most.
    """
    prior = list(model.info.acceptance) if model.info is not None else []
    if model.experience is None:
        most = 0 if model.mtp_heads is None else _most_chain(model.mtp_heads)
        model.experience = Experience.fresh(max(most, model.most_drafts), prior, model.lead)
    return prior
