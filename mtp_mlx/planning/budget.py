"""The planner behind layout "auto": as many drafts and slots as pay off, none if nothing pays off.

Decoding is a Markov decision process whose state is the number of drafts at hand. A step costs c(rows) seconds and
earns 1 + accepted tokens; the slots after acceptance length a give the drafts of the next step if exactly a drafts
are accepted. The rate lambda (tokens per second) and the value h(n) of holding n drafts are found by policy iteration
(Howard 1960), because value iteration oscillates on periodic chains such as those of linear layouts. A step then
takes the layout with the largest

    1 + E[accepted] - lambda * c(layout) + sum_a P(accept exactly a) * h(slots[a]),

where slots are added greedily to the group in which the next ones are worth most per slot. Plain decoding is one of
the layouts: if no slots pay off, "auto" decodes plainly and tries the drafter again only now and then, at growing
intervals, because acceptance changes with the text.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mtp_mlx.decode.layout import Layout
from mtp_mlx.decode.lookup import LOOKUP
from mtp_mlx.decode.policy import Proposal
from mtp_mlx.planning.acceptance import AcceptanceEstimate
from mtp_mlx.planning.cost import CostCorrection, StepCost

SOLVE_EVERY = 24  # steps between policy iterations
SOLVE_EARLY = (4, 8, 16)  # and at these first steps, while the estimates change most
MOST_ITERATIONS = 20
RESTART = 1e-6  # probability of losing the drafts at hand; gives every policy one recurrent class
FIRST_PROBE, LAST_PROBE = 48, 768  # plain steps before drafting is tried again: at first, and at most
LOOKUP_DRAFTS = 23
LOOKUP_PRIOR = (0.45, 0.75, 0.85, 0.9)
TEXT_PRIOR = (0.4, 0.6, 0.7, 0.8)  # of drafts from other texts
PATIENCE = 8  # slots added without gain before giving up: the cost curve is a staircase
MARGIN = 1.1  # expected speed-up needed over plain decoding, since costs and acceptance are estimates


@dataclass(frozen=True)
class Experience:
    """What has been learnt about a model on this machine; its generations share it and keep updating it.

    Attributes:
        acceptance: estimates by drafter name.
        cost: correction of the measured cost curve.
    """

    acceptance: dict[str, AcceptanceEstimate]
    cost: CostCorrection

    @classmethod
    def fresh(cls, own: str, drafts: int, prior: Sequence[float], lead: int = 0) -> Experience:
        """An experience without observations.

        Args:
            own: name of the model's own drafter; "" if it has none.
            drafts: most drafts that it makes per step.
            prior: its recorded acceptance per depth.
            lead: rows at the start of every slot group that draft nothing.
        """
        acceptance = {
            own: AcceptanceEstimate(max(drafts, 1), list(prior) or None),
            LOOKUP: AcceptanceEstimate(LOOKUP_DRAFTS, LOOKUP_PRIOR, memory=60.0),
        }
        return cls(acceptance, CostCorrection(lead))

    def of(self, source: str) -> AcceptanceEstimate:
        """The estimate of a drafter; one that drafts from text alone gets it with its first drafts."""
        if source not in self.acceptance:
            self.acceptance[source] = AcceptanceEstimate(LOOKUP_DRAFTS, TEXT_PRIOR, memory=60.0)
        return self.acceptance[source]


class BudgetPolicy:
    """Plans every step as the module describes; implements `mtp_mlx.decode.policy.Policy`.

    Args:
        cost: measured seconds of steps.
        drafts: most slots after one position, or most drafts of a chain; 0 for lookup drafts only.
        prior: the adapter's recorded acceptance per depth.
        own: name of the model's own drafter; "" if it has none.
        experience: that of earlier generations, updated in place; None to start without.
    """

    def __init__(
        self,
        cost: StepCost,
        drafts: int,
        prior: Sequence[float],
        own: str,
        experience: Experience | None = None,
    ) -> None:
        self._cost, self._drafts, self._context = cost, drafts, 0
        self.own = own
        self.max_drafts, self.own_drafts = max(LOOKUP_DRAFTS, drafts), drafts
        self._experience = experience or Experience.fresh(own, drafts, prior, cost.lead)
        self._correction = self._experience.cost
        self._steps = 0
        self._plain_steps = 0
        self._probe_after = FIRST_PROBE
        self._probing = False
        self._worth = [0.0] * (drafts + 1)
        self._rate = 0.0
        self._planned = False  # solved when the context is known, or on first use

    @property
    def rate(self) -> float:
        """Expected tokens per second."""
        if not self._planned:
            self._solve()
        return self._rate

    @property
    def verdict(self) -> str:
        """The planner's current expectation as a sentence."""
        if not self._drafts:
            return ""
        plain = 1.0 / self._seconds(Layout.plain())
        if self.rate <= plain * MARGIN:
            return f"drafting by {self.own} does not pay off here; plain unless drafts are near certain"
        return f"drafting by {self.own} expected to give {self.rate / plain:.2f}x plain"

    def begin(self, context: int) -> None:
        """Plans for steps with `context` cached tokens; see `Policy`."""
        if context != self._context or not self._planned:
            self._context = context
            self._solve()

    def choose(self, proposals: Sequence[Proposal]) -> tuple[Proposal, Layout]:
        """The proposal and layout of the highest value; see `Policy`."""
        if not self._planned:
            self._solve()
        offered = [self._experience.of(proposal.source).offer(proposal.confidences) for proposal in proposals]
        if self._probing and self._drafts:
            self._probing = False
            return proposals[0].cut(0), self._fullest(0)
        best = (self._plain_value(), proposals[0].cut(0), Layout.plain())
        for proposal, chances in zip(proposals, offered, strict=True):
            value, layout = self._best_layout(chances)
            if value > best[0]:
                best = (value, proposal, layout)
        return best[1], best[2]

    def observe(self, proposal: Proposal, layout: Layout, n_accepted: int, seconds: float) -> None:
        """Learns acceptance and cost; see `Policy`."""
        self._correction.observe(layout, self._cost.seconds(layout, self._context), seconds)
        self._context += 1 + n_accepted
        self._steps += 1
        if layout == Layout.plain():
            self._plain_steps += 1
        elif layout.drafts:
            known = self._experience.of(proposal.source)
            known.update(layout.drafts, n_accepted, proposal.confidences)
            if proposal.source == self.own:
                paid = 1 + n_accepted > self.rate * self._seconds(layout)
                self._probe_after = FIRST_PROBE if paid else min(2 * self._probe_after, LAST_PROBE)
        if self._steps % SOLVE_EVERY == 0 or self._steps in SOLVE_EARLY:
            self._solve()

    def interrupts_plain(self) -> bool:
        """True if drafting has not been tried for a while; see `Policy`."""
        if self._drafts and self._plain_steps >= self._probe_after:
            self._plain_steps = 0
            self._probing = True
        return self._probing

    def _seconds(self, layout: Layout) -> float:
        return self._cost.seconds(layout, self._context) * self._correction.factor(layout)

    def _plain_value(self) -> float:
        return 1.0 - self.rate * self._seconds(Layout.plain())

    def _best_layout(self, chances: Sequence[float]) -> tuple[float, Layout]:
        """(value, layout) of the best layout, given each draft's chance of acceptance after the one before it."""
        best = (-1e9, Layout.plain())
        reach = [1.0]  # P(at least a accepted)
        for chance in chances:
            reach.append(reach[-1] * chance)
        for drafts in _draft_counts(len(chances)):
            exact = [reach[a] - reach[a + 1] for a in range(drafts)] + [reach[drafts]]
            value, layout = self._with_slots(sum(reach[1 : drafts + 1]), exact)
            if value > best[0]:
                best = (value, layout)
            if drafts and reach[drafts] < 0.02:
                break
        return best

    def _fullest(self, drafts: int) -> Layout:
        """The layout that verifies `drafts` drafts and makes as many new ones as possible."""
        return Layout.linear(drafts, self._drafts)

    def _held_after(self, layout: Layout) -> Sequence[int]:
        """[drafts + 1] number of drafts at hand after a step, by the number accepted."""
        return layout.slots

    def _with_slots(self, accepted: float, exact: Sequence[float]) -> tuple[float, Layout]:
        """(value, layout) after adding slots greedily, each to the group where it is worth most.

        Args:
            accepted: expected number of accepted drafts.
            exact: [drafts + 1] P(exactly a drafts are accepted).
        """
        drafts = len(exact) - 1
        slots = [0] * (drafts + 1)
        worth, runs = self._worth, self._runs
        held_worth = 0.0
        best = (1.0 + accepted - self.rate * self._seconds(Layout(drafts, tuple(slots))), tuple(slots))
        idle = 0
        while idle < PATIENCE:
            group = max(range(drafts + 1), key=lambda a: exact[a] * runs[slots[a]][0])
            start, (gain, last) = slots[group], runs[slots[group]]
            if exact[group] * gain <= 1e-4:
                break
            while slots[group] < last:
                slots[group] += 1
                held = held_worth + exact[group] * (worth[slots[group]] - worth[start])
                value = 1.0 + accepted + held - self.rate * self._seconds(Layout(drafts, tuple(slots)))
                idle += 1
                if value > best[0]:
                    best, idle = (value, tuple(slots)), 0
            held_worth = held
        return best[0], Layout(drafts, best[1])

    def _solve(self) -> None:
        """Policy iteration for `rate` and `_worth`: evaluate the policy exactly and improve it, until stable."""
        self._planned = True
        known = self._experience.of(self.own)
        chances = [known.probability(depth + 1) for depth in range(self._drafts)]
        plain = 1.0 / self._seconds(Layout.plain())
        policy = [self._fullest(held) for held in range(self._drafts + 1)]
        best, last = (plain, [0.0] * (self._drafts + 1)), 0.0
        for _ in range(MOST_ITERATIONS):
            self._rate, self._worth = self._valued(policy, chances)
            self._runs = _best_runs(self._worth)
            if self._rate > best[0] * MARGIN or best[0] > plain and self._rate > best[0]:
                best = (self._rate, self._worth)
            if self._rate <= last * (1 + 1e-9):
                break
            last = self._rate
            policy = [self._best_layout(chances[:held])[1] for held in range(self._drafts + 1)]
        self._rate, self._worth = best
        self._runs = _best_runs(self._worth)

    def _valued(self, policy: Sequence[Layout], chances: Sequence[float]) -> tuple[float, list[float]]:
        """(rate, values [drafts + 1]) of a policy, from one linear system with values[0] = 0.

        Args:
            policy: [drafts + 1] the layout used with each number of drafts at hand.
            chances: chance of acceptance per depth, given the one before.
        """
        states = len(policy)
        left, tokens = np.zeros((states + 1, states + 1)), np.zeros(states + 1)
        left[states, 0] = 1.0
        for held, layout in enumerate(policy):
            reach = np.cumprod([1.0, *chances[: layout.drafts]])
            tokens[held] = reach.sum()
            left[held, held] += 1.0
            left[held, states] = self._seconds(layout)
            left[held, 0] -= RESTART
            for count, chance in zip(
                self._held_after(layout), np.append(reach[:-1] - reach[1:], reach[-1]), strict=True
            ):
                left[held, count] -= (1 - RESTART) * chance
        solution = np.linalg.solve(left, tokens)
        return float(solution[states]), solution[:states].tolist()


def _best_runs(worth: Sequence[float]) -> list[tuple[float, int]]:
    """For every number of slots, (gain per slot, last slot) of the best run of further slots.

    Runs rather than single slots, because two slots may pay off where one does not.
    """
    runs = []
    for held, base in enumerate(worth):
        ends = range(held + 1, len(worth))
        runs.append(max([((worth[end] - base) / (end - held), end) for end in ends] or [(-1.0, held)]))
    return runs


def _draft_counts(most: int) -> list[int]:
    """The numbers of drafts to compare: all up to 4, a few larger ones, and `most`."""
    return [count for count in range(most + 1) if count <= 4 or count in (6, 8, 11, 15, 19) or count == most]


class ChainBudgetPolicy(BudgetPolicy):
    """`BudgetPolicy` for drafts that are made one after another after the pass.

    The decision process is the same with other actions: a chain of k drafts follows every outcome and adds no rows to
    the pass, but each draft takes its own time. So a step takes the layout with the largest

        1 + E[accepted] - lambda * c(drafts, k) + h(k).
    """

    def _fullest(self, drafts: int) -> Layout:
        return Layout.chained(drafts, self._drafts)

    def _held_after(self, layout: Layout) -> Sequence[int]:
        return (layout.chain,) * (layout.drafts + 1)

    def _with_slots(self, accepted: float, exact: Sequence[float]) -> tuple[float, Layout]:
        """(value, layout) of the best chain; arguments as in `BudgetPolicy._with_slots`."""
        best = (-1e9, Layout.plain())
        for chain in range(self._drafts + 1):
            layout = Layout.chained(len(exact) - 1, chain)
            value = 1.0 + accepted + self._worth[chain] - self.rate * self._seconds(layout)
            if value > best[0]:
                best = (value, layout)
        return best
