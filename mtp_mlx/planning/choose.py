"""Turns `layout`, `drafts`, `lookup`, `drafter` and `emission` into a policy and the drafters of a generation.

A model has at most one drafter of its own (`AttachedModel.speculator`). Beside it, text alone can draft: the text so
far (lookup), or other texts as well (`AttachedModel.text_source`), which then take the place of lookup. With both,
fixed layouts verify lookup drafts if there is a match, and otherwise the drafts of which more are expected to be
right; "auto" and "tree" join them in one tree, where drafts may have branches.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from mtp_mlx.decode.drafter import DraftSource, source_of
from mtp_mlx.decode.emission import Emission
from mtp_mlx.decode.emit import check_unverified
from mtp_mlx.decode.lookup import LOOKUP, LookupDrafter, TextDrafter
from mtp_mlx.decode.policy import ChainPolicy, ConfidencePolicy, FixedPolicy, LayoutName, LookupPolicy, Policy
from mtp_mlx.decode.stats import DecodeStats
from mtp_mlx.drafters import registry
from mtp_mlx.errors import MTPError
from mtp_mlx.model.attach import AttachedModel
from mtp_mlx.model.branches import why_no_branches
from mtp_mlx.model.precision import nearest_precision
from mtp_mlx.planning.budget import BudgetPolicy, ChainBudgetPolicy, LinearBudgetPolicy
from mtp_mlx.planning.calibrate import prepare_costs, step_cost
from mtp_mlx.planning.experience import Experience
from mtp_mlx.planning.grow import TreePolicy
from mtp_mlx.planning.tuned import recall

LAYOUT_NAMES: tuple[LayoutName, ...] = ("auto", "linear", "quadratic", "tree", "plain")
TREE_ROWS = 16  # rows of a pass of layout "tree", unless the user says how many
MOST_ROWS = 64
LOOKUP_DRAFTS = 8  # default drafts per step of a fixed layout with lookup alone
MOST_LOOKUP = 16  # most drafts per step of that layout
SHORTEST, SHORTEST_PLANNED = (
    3,
    2,
)  # n-grams that lookup searches for; the planner knows how little short ones say
_NO_GROUPS = "layout 'quadratic' is for slots, not for {who}: use `layout` linear, auto or plain"
_ONE_GROUP = (
    "layout '{layout}' has slots behind several rows, and {reason}: use `layout` linear, auto or plain"
)


@dataclass(frozen=True)
class DrafterChoice:
    """The drafters in use.

    Attributes:
        own: whether the model's own drafter drafts.
        lookup: whether lookup drafts.
        texts: whether the model's text source drafts.
    """

    own: bool
    lookup: bool
    texts: bool = False

    @property
    def from_text(self) -> bool:
        """Whether anything drafts from text alone."""
        return self.lookup or self.texts


def choose_drafters(
    model: AttachedModel, drafter: str | None, lookup: bool | None, layout: LayoutName
) -> DrafterChoice:
    """The drafters named by `drafter` (comma-separated) or, if that is None, by `lookup`.

    Raises:
        MTPError: if a name is unknown, the model lacks a drafter, or both arguments are given.
    """
    texts = model.text_source
    if drafter is None:
        planned = lookup is None and layout in ("auto", "tree")
        found = texts is not None and (texts.named or planned)
        alone = (bool(lookup) or found) and source_of(model) is None  # text needs no adapter
        return DrafterChoice(own=not alone, lookup=planned or bool(lookup), texts=found)
    if lookup is not None:
        raise MTPError("use `drafter` or `lookup`, not both: leave `lookup` out")
    own, needs = own_name(model), registry.drafter_names()
    names = [name.strip() for name in drafter.split(",")]
    for name in names:
        if name != LOOKUP and name not in needs:
            raise MTPError(f"unknown drafter '{name}': choose from {', '.join([*needs, LOOKUP])}")
        if name not in (LOOKUP, own, texts and texts.name):
            raise MTPError(f"drafter '{name}' needs {needs[name]}")
    found = bool(texts) and texts.name in names
    return DrafterChoice(own=own in names, lookup=LOOKUP in names, texts=found)


def settled_layout(
    model: AttachedModel, layout: LayoutName, lookup: bool | None = None, drafter: str | None = None
) -> LayoutName:
    """`layout`, except that "auto" is "linear" if the user fixed the drafts per step and chose no drafter."""
    source = source_of(model)
    fixed = source is not None and source.fixed and lookup is None and drafter is None
    return "linear" if layout == "auto" and fixed else layout


def layout_in_use(model: AttachedModel, layout: LayoutName, emission: Emission) -> LayoutName:
    """`layout`, except for what "auto" means with verified drafts and a tau: quadratic, where that is possible."""
    if layout == "auto" and emission.lossless and emission.threshold is not None:
        return "linear" if model.why_linear else "quadratic"
    return layout


@dataclass(frozen=True)
class Drafting:
    """The policy of a generation, and what drafts from text alone, or None."""

    policy: Policy
    lookup: TextDrafter | None


def plan_drafting(
    model: AttachedModel,
    layout: LayoutName,
    drafts: int | None,
    stats: DecodeStats,
    lookup: bool | None = None,
    drafter: str | None = None,
    emission: Emission | None = None,
    max_tokens: int | None = None,
    rows: int | None = None,
) -> Drafting:
    """The policy of a generation, and what drafts from text alone.

    If drafts from text are asked for and the layout cannot use them, `stats.fallbacks` counts that. Layout "auto"
    without other arguments or texts uses the result of `mtp-mlx tune`, if there is one, and `stats.tuned` says so.

    Args:
        model: the model with its drafter.
        layout: layout of the steps.
        drafts: drafts per step; None for the drafter's default.
        stats: records fallbacks and tuning.
        lookup: whether lookup drafts too; None for the layouts "auto" and "tree" only.
        drafter: comma-separated drafters, instead of `lookup`.
        emission: verified without a tau by default.
        max_tokens: most tokens of the text. A few are written plainly as long as step costs are not known.
        rows: rows of a pass of layout "tree", by default `TREE_ROWS`.

    Raises:
        MTPError: as `choose_drafters` and the policies, or if `drafter` comes with another emission than the default.
    """
    emission, running_text = emission or Emission(), lookup is not False
    _check_rows(layout, rows)
    if emission != Emission():
        _check_alone(drafter)
        lookup = bool(lookup)  # lookup only if requested
    layout = settled_layout(model, layout, lookup, drafter)
    named = model.text_source is not None and model.text_source.named
    free = not named and (drafts, lookup, drafter, emission) == (None, None, None, Emission())
    if layout == "auto" and free and (tuned := recall(model)):
        layout, drafts, drafter, rows = tuned.layout, tuned.drafts, tuned.drafter, tuned.rows
        stats.tuned = tuned.description
    chosen = choose_drafters(model, drafter, lookup, layout)
    if layout == "auto" and emission == Emission() and not prepare_costs(model, max_tokens):
        layout = "plain"
        stats.fallbacks["plain: for so few tokens, what a step costs here was not measured"] += 1
    if layout == "tree":
        policy = tree_policy(model, drafts if chosen.own else 0, rows, emission)
    elif chosen.own or emission != Emission():
        policy = build_policy(model, layout, drafts, stats, emission)
    else:
        policy = lookup_policy(model, layout, drafts)
    if chosen.lookup and not policy.max_drafts and (lookup or drafter):
        stats.fallbacks["no lookup: this layout verifies no drafts"] += 1
    return Drafting(policy, _text_drafter(model, chosen, layout, policy, stats, emission, running_text))


def _text_drafter(
    model: AttachedModel,
    chosen: DrafterChoice,
    layout: LayoutName,
    policy: Policy,
    stats: DecodeStats,
    emission: Emission,
    running_text: bool,
) -> TextDrafter | None:
    """What drafts from text alone; counts a fallback if a text source that was named has no use."""
    texts = model.text_source if chosen.texts else None
    if texts is not None and policy.max_drafts and emission.lossless:
        branching = layout == "tree" or layout == "auto" and not why_no_branches(model)
        return texts.open(running_text=running_text, branching=branching)
    if texts is not None and texts.named:
        stats.fallbacks[f"no drafts from {texts.name}: {_why_unused(emission)}"] += 1
    if not chosen.lookup or not policy.max_drafts:
        return None
    return LookupDrafter(shortest=SHORTEST_PLANNED if layout == "auto" else SHORTEST)


def _why_unused(emission: Emission) -> str:
    """Why drafts from other texts have no use in a generation."""
    return "this layout verifies no drafts" if emission.lossless else "unverified drafts come from slots only"


def _check_alone(drafter: str | None) -> None:
    """Raises MTPError if a drafter is named for an emission that has one of its own."""
    if drafter is not None:
        raise MTPError("unverified emission and `tau` are for slot drafts only: leave `drafter` out")


def tree_policy(
    model: AttachedModel, drafts: int | None, rows: int | None, emission: Emission | None = None
) -> Policy:
    """The policy of layout "tree".

    Args:
        model: the model.
        drafts: positions that its own drafter drafts in a step; None for the drafter's default, 0 for none.
        rows: rows of a pass, by default `TREE_ROWS`.

    Raises:
        MTPError: if the drafter cannot draft that many positions, or the emission is not the default.
    """
    if emission not in (None, Emission()):
        raise MTPError("unverified emission and `tau` have layouts of their own: leave `layout` tree out")
    source = source_of(model)
    prior = recorded_acceptance(model)
    if source is None or drafts == 0:
        return TreePolicy(rows or TREE_ROWS, 0, [], places_slots=False)
    source.check_drafts(drafts)
    if source.places_slots:
        _check_groups(model, "tree")
    return TreePolicy(
        rows or TREE_ROWS,
        drafts or source.drafts,
        prior,
        places_slots=source.places_slots,
        lead=model.lead,
    )


def _check_rows(layout: LayoutName, rows: int | None) -> None:
    """Raises MTPError for rows of a layout that has no fixed number of them, or a number that cannot be."""
    if rows is None:
        return
    if layout != "tree":
        raise MTPError(f"`rows` is for layout 'tree', and the layout is '{layout}': leave `rows` out")
    if not 2 <= rows <= MOST_ROWS:
        raise MTPError(f"`rows` must be 2 to {MOST_ROWS}; got {rows}")


def lookup_policy(model: AttachedModel, layout: LayoutName, drafts: int | None) -> Policy:
    """The policy for lookup alone, which works with any model.

    Args:
        model: the model.
        layout: layout of the steps.
        drafts: most drafts per step of a fixed layout.

    Raises:
        MTPError: if the layout is unknown or needs slots, or the number of drafts is out of range.
    """
    _check_layout(layout)
    if layout == "quadratic":
        raise MTPError(_NO_GROUPS.format(who="drafter 'lookup'"))
    if drafts is not None and not 1 <= drafts <= MOST_LOOKUP:
        raise MTPError(f"with drafter 'lookup', drafts per step must be 1 to {MOST_LOOKUP}; got {drafts}")
    if layout == "plain":
        return FixedPolicy("plain", 0)
    if layout == "linear":
        return LookupPolicy(drafts or LOOKUP_DRAFTS)
    recorded_acceptance(model)  # generations with the model's own drafter will share what is learnt here
    return BudgetPolicy(step_cost(model), 0, [], own_name(model), model.experience)


def build_policy(
    model: AttachedModel,
    layout: Literal["auto", "linear", "quadratic", "plain"],
    drafts: int | None,
    stats: DecodeStats,
    emission: Emission | None = None,
) -> Policy:
    """The policy for `layout`. With a tau it submits fewer drafts; unverified emission has a layout of its own.

    Raises:
        MTPError: if the layout is unknown or does not suit the drafter, if the layout drafts and the model has no
            drafter, if the drafter cannot make that many drafts, or if the emission does not suit the model or the
            layout.
    """
    _check_layout(layout)
    emission = emission or Emission()
    source = source_of(model)
    if emission.threshold is not None or not emission.lossless:
        return _emission_policy(model, layout, drafts, stats, emission)
    if source is None:
        return _bare_policy(model, layout, drafts)
    if layout == "quadratic" and not source.places_slots:
        raise MTPError(_NO_GROUPS.format(who=source.title))
    source.check_drafts(drafts)
    if layout == "plain":
        return FixedPolicy("plain", 0)
    most = drafts or source.drafts
    stats.looped = source.looped(most)
    if layout == "quadratic":
        _check_groups(model, layout)
    if layout == "auto":
        prior = recorded_acceptance(model)
        planner = _planner(model, source, stats)
        return planner(step_cost(model), most, prior, source.name, model.experience)
    return FixedPolicy(layout, most) if source.places_slots else ChainPolicy(most)


def _planner(model: AttachedModel, source: DraftSource, stats: DecodeStats) -> type[BudgetPolicy]:
    """The planner for a model's own drafter; counts a fallback if it may not place slots everywhere."""
    if not source.places_slots:
        return ChainBudgetPolicy
    if not model.why_linear:
        return BudgetPolicy
    stats.fallbacks[f"slots behind the last draft only: {model.why_linear}"] += 1
    return LinearBudgetPolicy


def _check_groups(model: AttachedModel, layout: LayoutName) -> None:
    """Raises MTPError for a layout with slots behind several rows of a model that cannot have them."""
    if model.why_linear:
        raise MTPError(_ONE_GROUP.format(layout=layout, reason=model.why_linear))


def _check_layout(layout: LayoutName) -> None:
    if layout not in LAYOUT_NAMES:
        raise MTPError(f"unknown layout '{layout}': choose one of {', '.join(LAYOUT_NAMES)}")


def _bare_policy(model: AttachedModel, layout: LayoutName, drafts: int | None) -> Policy:
    """The policy of a model without a drafter of its own: plain, or planned for lookup."""
    if layout in ("linear", "quadratic"):
        raise MTPError(f"layout '{layout}' needs an adapter: name one with `adapter`, or use `layout` plain")
    if drafts is not None:
        raise MTPError(f"this model has no drafter to make {drafts} drafts: name an adapter with `adapter`")
    if layout == "plain":
        return FixedPolicy("plain", 0)
    recorded_acceptance(model)
    return BudgetPolicy(step_cost(model), 0, [], "", model.experience)


def _emission_policy(
    model: AttachedModel, layout: LayoutName, drafts: int | None, stats: DecodeStats, emission: Emission
) -> Policy:
    """The policy of verified emission with a tau, or of unverified emission."""
    source = source_of(model)
    what = "verified with a tau" if emission.lossless else emission.name
    if source is None or not source.places_slots:
        raise MTPError(
            f"emission '{what}' needs an adapter with mask tokens: name one with `adapter`, or leave `emission` and "
            "`tau` out"
        )
    if not emission.lossless:
        check_unverified(source, emission)
    source.check_drafts(drafts)
    most = drafts or source.drafts
    if layout == "plain" or (layout == "quadratic" and not emission.lossless):
        raise MTPError(f"emission '{what}' cannot be combined with layout '{layout}': leave one of them out")
    if not emission.lossless:
        return FixedPolicy("linear", most)
    assert emission.threshold is not None
    if layout == "quadratic":
        _check_groups(model, layout)
    elif layout == "auto" and model.why_linear:
        stats.fallbacks[f"linear layout: {model.why_linear}"] += 1
    used = layout_in_use(model, layout, emission)
    fixed = FixedPolicy("linear" if used == "linear" else "quadratic", most)
    return ConfidencePolicy(fixed, emission.threshold)


def own_name(model: AttachedModel) -> str:
    """Name of the model's own drafter; "" if it has none."""
    source = source_of(model)
    return "" if source is None else source.name


def recorded_acceptance(model: AttachedModel) -> list[float]:
    """The adapter's recorded acceptance per depth; also creates the model's experience if it has none yet.

    Of several records it is the one of the base in the precision nearest to this model's.
    Later generations may ask for more drafts than this one, so the experience has room for the most possible.
    """
    prior: list[float] = []
    if model.info is not None:
        known = model.info.acceptance_by_precision
        nearest = nearest_precision(known, model.precision)
        prior = list(model.info.acceptance if nearest is None else known[nearest])
    if model.experience is None:
        source = source_of(model)
        most = 0 if source is None else max(source.most_drafts, source.drafts)
        model.experience = Experience.fresh(own_name(model), most, prior)
    return prior
