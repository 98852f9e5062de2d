"""The common layout of a batch's steps.

A fixed layout is used as it is. "auto" chooses the form and the number of slots (or of chained drafts) with the
most expected tokens per second for the whole batch, where no drafts is one of the choices. B sequences of R rows
cost about c(B R), so batches draft less than single sequences. In the linear form, sequences wait for each other:
the only slot group is behind all drafts of the pass, out of reach of sequences that have fewer drafts. Its rate is
therefore that of the whole batch, and falls with every further sequence even if rows are free.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mtp_mlx.decode.drafter import source_of
from mtp_mlx.decode.layout import Layout
from mtp_mlx.decode.policy import LayoutName
from mtp_mlx.model.attach import AttachedModel
from mtp_mlx.planning.budget import MARGIN
from mtp_mlx.planning.choose import (
    LOOKUP_DRAFTS,
    choose_drafters,
    settled_layout,
)
from mtp_mlx.planning.cost import StepCost
from mtp_mlx.planning.experience import Experience
from mtp_mlx.planning.hindsight import Hindsight

PLAN_EVERY = 32  # steps


@dataclass(frozen=True)
class BatchDrafting:
    """What a batch may draft with.

    Attributes:
        form: "plain", "linear" and "quadratic" are fixed; "auto" plans.
        slots: most slots behind one position; 0 if the model's own drafter uses no slots.
        chain: most drafts made after a pass (by heads or a draft model); 0 if there are none.
        lookup: most drafts from the text itself; 0 without lookup.
        own: name of the model's own drafter; "" without one.
    """

    form: LayoutName
    slots: int = 0
    chain: int = 0
    lookup: int = 0
    own: str = ""


class BatchPlan:
    """Chooses the layout of every step of a batch.

    Args:
        drafting: the allowed drafters and limits.
        cost: measured seconds per step; required for "auto".
        experience: acceptance observed so far, shared with single sequences; required for "auto".
    """

    def __init__(
        self, drafting: BatchDrafting, cost: StepCost | None = None, experience: Experience | None = None
    ) -> None:
        self._drafting, self._cost, self._experience = drafting, cost, experience
        if drafting.form == "auto" and (cost is None or experience is None):
            raise ValueError("a planned layout needs costs and experience")
        own = drafting.chain or drafting.slots
        self.max_drafts = 0 if drafting.form == "plain" else max(own, drafting.lookup)
        self.own_drafts = 0 if drafting.form == "plain" else own
        self._chosen: BatchDrafting = drafting
        self._planned_for = 0
        self._context = 0
        self._steps = 0

    def choose(self, at_hand: Sequence[int], contexts: Sequence[int]) -> Layout:
        """The layout of the next step, which may verify fewer drafts than there are.

        Args:
            at_hand: [B] number of drafts of each sequence.
            contexts: [B] number of cached tokens of each sequence.
        """
        if self._drafting.form == "auto":
            self._plan(len(at_hand), round(sum(contexts) / max(len(contexts), 1)))
        chosen = self._chosen
        own = chosen.chain or chosen.slots
        drafts = min(max(at_hand, default=0), max(own, chosen.lookup))
        if chosen.form == "plain":
            return Layout.plain()
        if chosen.chain:
            return Layout.chained(drafts, chosen.chain)
        if not chosen.slots:
            return Layout(drafts, (0,) * (drafts + 1))
        build = (
            Layout.linear if chosen.form == "linear" else Layout.quadratic
        )  # a tree's passes alone have branches
        return build(drafts, chosen.slots)

    def hindsight(self) -> Hindsight | None:
        """What learns from all drafts of one sequence, for the experience; None if there is none to learn for."""
        return None if self._experience is None else Hindsight(self._experience)

    # --- "auto" ---------------------------------------------------------------------------------------------

    def _plan(self, n_sequences: int, context: int) -> None:
        self._steps += 1
        if self._planned_for == n_sequences and self._steps % PLAN_EVERY:
            return
        self._planned_for, self._context = n_sequences, context
        plain = BatchDrafting("plain")
        best, best_rate = plain, 1.0 / self._seconds(n_sequences, Layout.plain()) * MARGIN
        for candidate in self._candidates():
            rate = self.rate(n_sequences, candidate)
            if rate > best_rate:
                best, best_rate = candidate, rate
        self._chosen = best

    def _candidates(self) -> list[BatchDrafting]:
        drafting = self._drafting
        if drafting.chain:
            return [BatchDrafting("linear", chain=k) for k in range(1, drafting.chain + 1)]
        forms: tuple[LayoutName, ...] = ("linear", "quadratic")
        return [BatchDrafting(form, slots=k) for k in range(1, drafting.slots + 1) for form in forms]

    def rate(self, n_sequences: int, drafting: BatchDrafting) -> float:
        """Expected steady-state tokens per second of each of B sequences, at the context length last planned for."""
        assert self._experience is not None
        count = drafting.chain or drafting.slots
        known = self._experience.acceptance[self._drafting.own]
        reach = [1.0]
        for depth in range(1, count + 1):
            reach.append(reach[-1] * known.probability(depth))
        accepted = sum(reach[1:])
        if drafting.chain:
            return (1 + accepted) / self._seconds(n_sequences, Layout.chained(count, count))
        if drafting.form == "quadratic":
            return (1 + accepted) / self._seconds(n_sequences, Layout.quadratic(count, count))
        # Linear: the only slot group is behind all drafts. A sequence that rejects a draft has none until no sequence
        # has any; then one pass that verifies nothing gives all of them drafts, and passes with drafts follow as
        # long as at least one sequence has accepted everything so far.
        empty = self._seconds(n_sequences, Layout.linear(0, count))
        full = self._seconds(n_sequences, Layout.linear(count, count))
        passes = _longest_run(n_sequences, reach[count])
        tokens = 1 + passes + accepted / (1 - reach[count])
        return tokens / (empty + passes * full)

    def _seconds(self, n_sequences: int, layout: Layout) -> float:
        """Seconds of one pass, including drafting for one sequence after another."""
        assert self._cost is not None
        drafts = max(*layout.slots, layout.chain)
        rows = n_sequences * self._cost.rows_of(layout)
        as_one = Layout(rows - 1, (0,) * rows)
        return self._cost.seconds(as_one, self._context) + n_sequences * self._cost.draft_seconds * drafts


def _longest_run(n_sequences: int, chance: float) -> float:
    """Expected number of passes until each of B sequences has failed once, if each succeeds with `chance` < 1."""
    most = (
        math.ceil(math.log(1e-9) / math.log(chance)) + 1
    )  # a sequence survives longer with probability 1e-9
    survives = chance ** np.arange(most)  # [passes] P(a sequence has not failed yet)
    return float((1 - (1 - survives) ** n_sequences).sum())


def batch_drafting(
    model: AttachedModel,
    layout: LayoutName,
    drafts: int | None,
    lookup: bool | None = None,
    drafter: str | None = None,
) -> BatchDrafting:
    """The `BatchDrafting` for the arguments of `plan_drafting`. "auto" plans for the model's own drafter only."""
    layout = settled_layout(model, layout, lookup, drafter)
    chosen = choose_drafters(model, drafter, lookup, layout)
    if layout == "plain":
        return BatchDrafting("plain")
    source = source_of(model)
    own = (drafts or model.most_drafts) if chosen.own else 0
    if not own and (layout == "auto" or not chosen.from_text):
        return BatchDrafting("plain")
    places_slots = source is not None and source.places_slots
    return BatchDrafting(
        layout,
        slots=own if places_slots else 0,
        chain=0 if places_slots else own,
        lookup=(own or drafts or LOOKUP_DRAFTS) if chosen.from_text and layout != "auto" else 0,
        own="" if source is None else source.name,
    )
