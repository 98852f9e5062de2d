"""Builds the policy that a layout's name stands for."""

from __future__ import annotations

from mtp_mlx.decode.budget import BudgetPolicy, Experience
from mtp_mlx.decode.calibrate import step_cost
from mtp_mlx.decode.policy import FixedPolicy, LayoutName, Policy
from mtp_mlx.decode.stats import DecodeStats
from mtp_mlx.errors import MTPError
from mtp_mlx.model.attach import AttachedModel

LAYOUT_NAMES: tuple[LayoutName, ...] = ("auto", "linear", "quadratic", "plain")


def build_policy(model: AttachedModel, layout: LayoutName, slots: int | None, stats: DecodeStats) -> Policy:
    """The policy for `layout`.

    Raises:
        MTPError: an unknown layout, slots without an adapter, or more slots than the adapter has.
    """
    if layout not in LAYOUT_NAMES:
        raise MTPError(f"unknown layout '{layout}': choose one of {', '.join(LAYOUT_NAMES)}")
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
        prior = list(model.info.acceptance) if model.info is not None else []
        if model.experience is None:
            model.experience = Experience.fresh(most, prior)
        return BudgetPolicy(step_cost(model), slots or most, prior, experience=model.experience)
    return FixedPolicy(layout, slots or most)
