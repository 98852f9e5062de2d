"""What `layout`, `drafts`, `lookup`, `drafter` and an emission stand for together: a policy, and who drafts.

A model has at most one drafter of its own (`AttachedModel.speculator`), and the text itself can draft beside it. With
both, fixed layouts verify the lookup's drafts where it has a match and the model's own otherwise; "auto" weighs them
by what they are worth.
"""

from __future__ import annotations

from dataclasses import dataclass

from mtp_mlx.decode.drafter import DraftSource, source_of
from mtp_mlx.decode.emission import Emission
from mtp_mlx.decode.emit import check_unverified
from mtp_mlx.decode.lookup import LOOKUP, LookupDrafter
from mtp_mlx.decode.policy import ChainPolicy, ConfidencePolicy, FixedPolicy, LayoutName, LookupPolicy, Policy
from mtp_mlx.decode.stats import DecodeStats
from mtp_mlx.drafters import registry
from mtp_mlx.errors import MTPError
from mtp_mlx.model.attach import AttachedModel
from mtp_mlx.planning.budget import BudgetPolicy, ChainBudgetPolicy, Experience
from mtp_mlx.planning.calibrate import step_cost
from mtp_mlx.planning.tuned import recall

LAYOUT_NAMES: tuple[LayoutName, ...] = ("auto", "linear", "quadratic", "plain")
LOOKUP_DRAFTS, MOST_LOOKUP = (
    8,
    16,
)  # of a fixed layout where nothing but the text drafts: unless given, and at most


@dataclass(frozen=True)
class DrafterChoice:
    """Who may propose drafts.

    Attributes:
        own: the model's own drafter.
        lookup: the text itself.
    """

    own: bool
    lookup: bool


def choose_drafters(
    model: AttachedModel, drafter: str | None, lookup: bool | None, layout: LayoutName
) -> DrafterChoice:
    """Reads `drafter` (names separated by commas) or, without it, `lookup`.

    Raises:
        MTPError: an unknown name, a drafter the model lacks, or both arguments at once.
    """
    if drafter is None:
        return DrafterChoice(own=True, lookup=layout == "auto" if lookup is None else lookup)
    if lookup is not None:
        raise MTPError("`drafter` says whether the text drafts too: leave `lookup` out")
    source = source_of(model)
    needs = registry.drafter_names()
    names = [name.strip() for name in drafter.split(",")]
    for name in names:
        if name != LOOKUP and name not in needs:
            raise MTPError(f"unknown drafter '{name}': choose from {', '.join([*needs, LOOKUP])}")
        if name != LOOKUP and (source is None or source.name != name):
            raise MTPError(f"drafter '{name}' needs {needs[name]}")
    return DrafterChoice(own=any(name != LOOKUP for name in names), lookup=LOOKUP in names)


def settled_layout(
    model: AttachedModel, layout: LayoutName, lookup: bool | None = None, drafter: str | None = None
) -> LayoutName:
    """`layout`, or what "auto" stands for where the user fixed the drafts of a step and says nothing else."""
    source = source_of(model)
    fixed = source is not None and source.fixed and lookup is None and drafter is None
    return "linear" if layout == "auto" and fixed else layout


@dataclass(frozen=True)
class Drafting:
    """The policy of a generation, and the drafter that reads the text itself, if there is one."""

    policy: Policy
    lookup: LookupDrafter | None


def plan_drafting(
    model: AttachedModel,
    layout: LayoutName,
    drafts: int | None,
    stats: DecodeStats,
    lookup: bool | None = None,
    drafter: str | None = None,
    emission: Emission | None = None,
) -> Drafting:
    """The policy and the drafters of a generation.

    A lookup that was asked for and that the layout cannot use is counted in `stats.fallbacks`. Layout "auto" with
    nothing else asked for is what `mtp-mlx tune` found, where it has run, and `stats.tuned` says so.

    Args:
        drafts: drafts per step; None for the drafter's own number.

    Raises:
        MTPError: as `choose_drafters`, `build_policy` and `lookup_policy`, or a drafter with another emission.
    """
    emission = emission or Emission()
    if emission != Emission():
        if drafter is not None:
            raise MTPError("another emission, or a tau, is about slots alone: leave `drafter` out")
        lookup = bool(lookup)  # the text itself drafts only where it is asked for
    layout = settled_layout(model, layout, lookup, drafter)
    if layout == "auto" and (drafts, lookup, drafter, emission) == (None, None, None, Emission()):
        tuned = recall(model)
        if tuned is not None:
            layout, drafts, drafter = tuned.layout, tuned.drafts, tuned.drafter
            stats.tuned = tuned.description
    chosen = choose_drafters(model, drafter, lookup, layout)
    if chosen.own:
        policy = build_policy(model, layout, drafts, stats, emission)
    else:
        policy = lookup_policy(model, layout, drafts)
    if chosen.lookup and not policy.max_drafts and (lookup or drafter):
        stats.fallbacks["no lookup: this layout verifies no drafts"] += 1
    return Drafting(policy, LookupDrafter() if chosen.lookup and policy.max_drafts else None)


def lookup_policy(model: AttachedModel, layout: LayoutName, drafts: int | None) -> Policy:
    """The policy where nothing but the text drafts, which any model can be used with.

    Args:
        drafts: most drafts in a step of a fixed layout.

    Raises:
        MTPError: an unknown layout or one that places slots, or a bad number of drafts.
    """
    _check_layout(layout)
    if layout == "quadratic":
        raise MTPError(_NO_GROUPS.format(who="drafter 'lookup' does"))
    if drafts is not None and not 1 <= drafts <= MOST_LOOKUP:
        raise MTPError(f"with drafter 'lookup', drafts per step must be 1 to {MOST_LOOKUP}; got {drafts}")
    if layout == "plain":
        return FixedPolicy("plain", 0)
    if layout == "linear":
        return LookupPolicy(drafts or LOOKUP_DRAFTS)
    recorded_acceptance(model)  # what is learnt here goes on to generations that use the model's own drafter
    return BudgetPolicy(step_cost(model), 0, [], own_name(model), model.experience)


def build_policy(
    model: AttachedModel,
    layout: LayoutName,
    drafts: int | None,
    stats: DecodeStats,
    emission: Emission | None = None,
) -> Policy:
    """The policy for `layout`; `emission` with a tau narrows it, and unverified emission has a layout of its own.

    Raises:
        MTPError: an unknown layout, one that the drafter does not go with, more drafts than it makes, a layout that
            drafts without a drafter, or an emission that does not go with the model or the layout.
    """
    _check_layout(layout)
    emission = emission or Emission()
    source = source_of(model)
    if emission.threshold is not None or not emission.lossless:
        return _emission_policy(source, layout, drafts, emission)
    if source is None:
        return _bare_policy(model, layout, drafts)
    if layout == "quadratic" and not source.places_slots:
        raise MTPError(_NO_GROUPS.format(who=f"{source.title} do"))
    source.check_drafts(drafts)
    if layout == "plain":
        return FixedPolicy("plain", 0)
    most = drafts or source.drafts
    stats.looped = source.looped(most)
    if layout == "auto":
        prior = recorded_acceptance(model)
        planner = BudgetPolicy if source.places_slots else ChainBudgetPolicy
        return planner(step_cost(model), most, prior, source.name, model.experience)
    return FixedPolicy(layout, most) if source.places_slots else ChainPolicy(most)


_NO_GROUPS = (
    "layout 'quadratic' places groups of slots, which {who} not need: use layout linear, auto or plain"
)


def _check_layout(layout: LayoutName) -> None:
    if layout not in LAYOUT_NAMES:
        raise MTPError(f"unknown layout '{layout}': choose one of {', '.join(LAYOUT_NAMES)}")


def _bare_policy(model: AttachedModel, layout: LayoutName, drafts: int | None) -> Policy:
    """The policy of a model without a drafter of its own: plain, or planned for what the text drafts."""
    if layout in ("linear", "quadratic"):
        raise MTPError(f"layout '{layout}' needs an adapter: name one with `adapter`, or use layout plain")
    if drafts is not None:
        raise MTPError(f"this model has nothing that makes {drafts} drafts: name an adapter with `adapter`")
    if layout == "plain":
        return FixedPolicy("plain", 0)
    recorded_acceptance(model)
    return BudgetPolicy(step_cost(model), 0, [], "", model.experience)


def _emission_policy(
    source: DraftSource | None, layout: LayoutName, drafts: int | None, emission: Emission
) -> Policy:
    """The policy of verified emission with a tau, or of unverified emission."""
    what = "verified with a tau" if emission.lossless else emission.name
    if source is None or not source.places_slots:
        raise MTPError(
            f"emission '{what}' needs an adapter with mask tokens: name one with `adapter`, or leave emission and "
            "tau out"
        )
    if not emission.lossless:
        check_unverified(source, emission)
    source.check_drafts(drafts)
    most = drafts or source.drafts
    if layout == "plain" or (layout == "quadratic" and not emission.lossless):
        raise MTPError(f"emission '{what}' does not go with layout '{layout}': drop one of them")
    if not emission.lossless:
        return FixedPolicy("linear", most)
    assert emission.threshold is not None
    fixed = FixedPolicy("linear" if layout == "linear" else "quadratic", most)
    return ConfidencePolicy(fixed, emission.threshold)


def own_name(model: AttachedModel) -> str:
    """Name of the model's own drafter; "" without one."""
    source = source_of(model)
    return "" if source is None else source.name


def recorded_acceptance(model: AttachedModel) -> list[float]:
    """Acceptance per depth that the adapter records; gives a model without any an experience to go on from.

    The experience goes on to generations that ask for more drafts than this one, so it has room for the most.
    """
    prior = list(model.info.acceptance) if model.info is not None else []
    if model.experience is None:
        source = source_of(model)
        most = 0 if source is None else max(source.most_drafts, source.drafts)
        model.experience = Experience.fresh(own_name(model), most, prior, model.lead)
    return prior
