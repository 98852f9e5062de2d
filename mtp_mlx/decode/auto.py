"""Builds the policy that a layout's name stands for."""

from __future__ import annotations

from mtp_mlx.decode.budget import BudgetPolicy, Experience
from mtp_mlx.decode.budget_heads import HeadsBudgetPolicy
from mtp_mlx.decode.calibrate import step_cost
from mtp_mlx.decode.policy import ChainPolicy, FixedPolicy, LayoutName, Policy
from mtp_mlx.decode.stats import DecodeStats
from mtp_mlx.errors import MTPError
from mtp_mlx.model.attach import AttachedModel

MOST_CHAIN = 16  # drafts of a chain of heads; the heads are applied again in turn where they are fewer
LAYOUT_NAMES: tuple[LayoutName, ...] = ("auto", "linear", "quadratic", "plain")


def build_policy(model: AttachedModel, layout: LayoutName, slots: int | None, stats: DecodeStats) -> Policy:
    """The policy for `layout`.

    Raises:
        MTPError: an unknown layout, slots without an adapter, more slots than the adapter has, or slot groups for
            MTP heads.
    """
    if layout not in LAYOUT_NAMES:
        raise MTPError(f"unknown layout '{layout}': choose one of {', '.join(LAYOUT_NAMES)}")
    if model.mtp_heads is not None:
        return _heads_policy(model, layout, slots, stats)
    most = 0 if model.adapter is None else model.adapter.config.slots
    if slots is not None and not 1 <= slots <= most:
        raise MTPError(
            f"slots must be from 1 to {most}, the slots this adapter was trained with; got {slots}"
        )
    if layout in ("linear", "quadratic") and not most:
        raise MTPError(f"layout '{layout}' needs an adapter: give one with --adapter, or use --layout plain")
    if layout == "plain":
        return FixedPolicy("plain", 0)
    if layout == "auto":
        prior = _recorded_acceptance(model, most)
        return BudgetPolicy(step_cost(model), slots or most, prior, experience=model.experience)
    return FixedPolicy(layout, slots or most)


def _heads_policy(model: AttachedModel, layout: LayoutName, slots: int | None, stats: DecodeStats) -> Policy:
    """The policy of a model with MTP heads; `slots` is then the number of drafts in each step."""
    if layout == "quadratic":
        raise MTPError(
            "layout 'quadratic' places groups of mask slots, which MTP heads do not need: they draft after every "
            "outcome; use --layout linear, auto or plain"
        )
    if slots is not None and not 1 <= slots <= MOST_CHAIN:
        raise MTPError(f"with MTP heads, slots are drafts in each step, from 1 to {MOST_CHAIN}; got {slots}")
    if layout == "plain":
        return FixedPolicy("plain", 0)
    chain = slots or model.most_drafts
    assert model.mtp_heads is not None
    count = len(model.mtp_heads.heads)
    if chain > count:
        stats.looped = f"{count} heads to {chain} drafts"
    if layout == "auto":
        prior = _recorded_acceptance(model, chain)
        return HeadsBudgetPolicy(step_cost(model), chain, prior, experience=model.experience)
    return ChainPolicy(chain)


def _recorded_acceptance(model: AttachedModel, drafts: int) -> list[float]:
    """Acceptance per depth that the adapter records; gives a model without any an experience to go on from."""
    prior = list(model.info.acceptance) if model.info is not None else []
    if model.experience is None:
        model.experience = Experience.fresh(drafts, prior)
    return prior
