"""Which drafters propose tokens: what `--drafter heads,lookup` stands for.

"heads" and "slots" are the adapter's own, one model has one of them; "lookup" is the text itself. With both, fixed
layouts verify the lookup's drafts where it has a match and the adapter's otherwise; "auto" weighs them by what they
are worth.
"""

from __future__ import annotations

from dataclasses import dataclass

from mtp_mlx.decode.auto import LAYOUT_NAMES, MOST_CHAIN, build_policy, recorded_acceptance
from mtp_mlx.decode.batch_plan import BatchDrafting
from mtp_mlx.decode.budget import BudgetPolicy
from mtp_mlx.decode.calibrate import step_cost
from mtp_mlx.decode.drafters.lookup import LookupDrafter
from mtp_mlx.decode.emission import Emission
from mtp_mlx.decode.policy import FixedPolicy, LayoutName, LookupPolicy, Policy
from mtp_mlx.decode.stats import DecodeStats
from mtp_mlx.decode.tuned import recall
from mtp_mlx.errors import MTPError
from mtp_mlx.model.attach import AttachedModel

DRAFTERS = ("heads", "slots", "lookup")
LOOKUP_DRAFTS = 8  # of a fixed layout, if the number is not given


@dataclass(frozen=True)
class DrafterChoice:
    """Who may propose drafts.

    Attributes:
        own: the adapter's mask slots or MTP heads.
        lookup: the text itself.
    """

    own: bool
    lookup: bool


def choose_drafters(
    model: AttachedModel, drafter: str | None, lookup: bool | None, layout: LayoutName
) -> DrafterChoice:
    """Reads `--drafter` (names separated by commas) or, without it, `--lookup`.

    Raises:
        MTPError: an unknown name, a drafter the model lacks, or both options at once.
    """
    if drafter is None:
        return DrafterChoice(own=True, lookup=layout == "auto" if lookup is None else lookup)
    if lookup is not None:
        raise MTPError("--drafter says whether the text drafts too: leave --lookup and --no-lookup out")
    names = [name.strip() for name in drafter.split(",")]
    for name in names:
        if name not in DRAFTERS:
            raise MTPError(f"unknown drafter '{name}': choose from {', '.join(DRAFTERS)}")
    if "heads" in names and model.mtp_heads is None:
        raise MTPError("drafter 'heads' needs an adapter with MTP heads: give one with --adapter")
    if "slots" in names and model.adapter is None:
        raise MTPError("drafter 'slots' needs an adapter with mask tokens: give one with --adapter")
    return DrafterChoice(own="heads" in names or "slots" in names, lookup="lookup" in names)


@dataclass(frozen=True)
class Drafting:
    """The policy of a generation, and the drafter that reads the text itself, if there is one."""

    policy: Policy
    lookup: LookupDrafter | None


def plan_drafting(
    model: AttachedModel,
    layout: LayoutName,
    slots: int | None,
    stats: DecodeStats,
    lookup: bool | None = None,
    drafter: str | None = None,
    emission: Emission | None = None,
) -> Drafting:
    """What `--layout`, `--slots`, `--lookup` or `--drafter`, and `--emit` with `--tau` stand for together.

    A lookup that was asked for and that the layout cannot use is counted in `stats.fallbacks`. Layout "auto" with
    nothing else asked for is what `mtp-mlx tune` found, where it has run, and `stats.tuned` says so.

    Raises:
        MTPError: as `choose_drafters`, `build_policy` and `lookup_policy`, or a drafter with another emission.
    """
    emission = emission or Emission()
    if emission != Emission():
        if drafter is not None:
            raise MTPError("--emit and --tau are about mask slots alone: leave --drafter out")
        lookup = bool(lookup)  # the text itself drafts only where it is asked for
    if layout == "auto" and (slots, lookup, drafter, emission) == (None, None, None, Emission()):
        tuned = recall(model)
        if tuned is not None:
            layout, slots, drafter = tuned.layout, tuned.slots, tuned.drafter
            stats.tuned = tuned.description
    chosen = choose_drafters(model, drafter, lookup, layout)
    if chosen.own:
        policy = build_policy(model, layout, slots, stats, emission)
    else:
        policy = lookup_policy(model, layout, slots)
    if chosen.lookup and not policy.max_drafts and (lookup or drafter):
        stats.fallbacks["no lookup: this layout verifies no drafts"] += 1
    return Drafting(policy, LookupDrafter() if chosen.lookup and policy.max_drafts else None)


def lookup_policy(model: AttachedModel, layout: LayoutName, drafts: int | None) -> Policy:
    """The policy where nothing but the text drafts, which any model can be used with.

    Args:
        drafts: most drafts in a step of a fixed layout.

    Raises:
        MTPError: an unknown layout or one that places mask slots, or a bad number of drafts.
    """
    if layout not in LAYOUT_NAMES:
        raise MTPError(f"unknown layout '{layout}': choose one of {', '.join(LAYOUT_NAMES)}")
    if layout == "quadratic":
        raise MTPError(
            "layout 'quadratic' places groups of mask slots, which drafter 'lookup' does not need: use --layout "
            "linear, auto or plain"
        )
    if drafts is not None and not 1 <= drafts <= MOST_CHAIN:
        raise MTPError(
            f"with drafter 'lookup', slots are drafts in each step, from 1 to {MOST_CHAIN}; got {drafts}"
        )
    if layout == "plain":
        return FixedPolicy("plain", 0)
    if layout == "linear":
        return LookupPolicy(drafts or LOOKUP_DRAFTS)
    recorded_acceptance(model)  # what is learnt here goes on to generations that use the adapter
    return BudgetPolicy(step_cost(model), 0, [], experience=model.experience)


def batch_drafting(
    model: AttachedModel,
    layout: LayoutName,
    slots: int | None,
    lookup: bool | None = None,
    drafter: str | None = None,
) -> BatchDrafting:
    """What the same options stand for where several sequences share passes. "auto" looks nothing up there."""
    chosen = choose_drafters(model, drafter, lookup, layout)
    if layout == "plain":
        return BatchDrafting("plain")
    own = (slots or model.most_drafts) if chosen.own else 0
    heads = model.mtp_heads is not None
    looked_up = own or slots or LOOKUP_DRAFTS
    if not own and (layout == "auto" or not chosen.lookup):
        return BatchDrafting("plain")
    return BatchDrafting(
        layout,
        slots=0 if heads else own,
        chain=own if heads else 0,
        lookup=looked_up if chosen.lookup and layout != "auto" else 0,
    )
