"""Which drafters propose tokens: what `--drafter heads,lookup` stands for.

"heads" and "slots" are the adapter's own, one model has one of them; "lookup" is the text itself. With both, fixed
layouts verify the lookup's drafts where it has a match and the adapter's otherwise; "auto" weighs them by what they
are worth.
"""

from __future__ import annotations

from dataclasses import dataclass

from mtp_mlx.decode.emission import Emission
from mtp_mlx.decode.lookup import LookupDrafter
from mtp_mlx.decode.policy import ChainPolicy, ConfidencePolicy, FixedPolicy, LayoutName, LookupPolicy, Policy
from mtp_mlx.decode.stats import DecodeStats
from mtp_mlx.drafters.heads.draft_heads import DraftHeads
from mtp_mlx.drafters.ptp.weights import PTPAdapter
from mtp_mlx.errors import MTPError
from mtp_mlx.model.attach import AttachedModel
from mtp_mlx.planning.budget import BudgetPolicy, Experience, HeadsBudgetPolicy
from mtp_mlx.planning.calibrate import step_cost
from mtp_mlx.planning.tuned import recall

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
