"""The planner behind layout "auto": as many drafts and slots as pay off, none if nothing pays off.

Decoding is a Markov decision process whose state is the number of drafts at hand. A step costs c(rows) seconds and
earns 1 + accepted tokens; the slots after acceptance length a give the drafts of the next step if exactly a drafts
are accepted. The rate lambda (tokens per second) and the value h(n) of holding n drafts are found by policy iteration
(Howard 1960), because value iteration oscillates on periodic chains such as those of linear layouts. A step then
takes the layout with the largest

    1 + E[accepted] - lambda * c(layout) + sum_a P(accept exactly a) * h(slots[a]),

where slots are added greedily to the group in which the next ones are worth most per slot. All drafts are
in one tree, of which the likeliest paths are verified, as many as give the largest value; a then stands for the row
at which the accepted path ends. In place of lambda stands the pace of this text, if that is higher: drafts from text,
which the process knows nothing of, can bring more than the model's own drafter does. Plain decoding is one of
the layouts: if no slots pay off, "auto" decodes plainly and tries the drafter again only now and then (`trials`),
because acceptance changes with the text.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache

import numpy as np

from mtp_mlx.decode.layout import Layout
from mtp_mlx.decode.policy import Proposal
from mtp_mlx.decode.tree import DraftTree
from mtp_mlx.planning.cost import StepCost
from mtp_mlx.planning.experience import LOOKUP_DRAFTS, Experience
from mtp_mlx.planning.grow import ends_of, merged
from mtp_mlx.planning.hindsight import Hindsight
from mtp_mlx.planning.trace import open_trace, traced

SOLVE_EVERY = 24  # steps between policy iterations
SOLVE_EARLY = (4, 8, 16)  # and at these first steps, while the estimates change most
MOST_ITERATIONS = 20
RESTART = 1e-6  # probability of losing the drafts at hand; gives every policy one recurrent class
LEAST_PATH = 0.02  # chance of a draft's path below which it is never verified
WIDTH = 4  # candidates per position that the model's own drafter drafts where drafts may have branches
RECENT_STEPS = 48.0  # half-life of a step's weight in the pace of this text, in steps
PATIENCE = 8  # slots added without gain before giving up: the cost curve is a staircase
PLAIN_EVERY = 64  # steps without a plain one after which one is made, because all else is compared with it
CATCHING_UP = 16  # tokens without a chain after which its first step is dearer: its drafter reads them first
MARGIN = 1.02  # expected speed-up needed over plain decoding, since costs and acceptance are estimates


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
        self._drafts, self._context = drafts, 0
        self.own = own
        self.max_drafts, self.own_drafts = max(LOOKUP_DRAFTS, drafts), drafts
        self._experience = experience or Experience.fresh(own, drafts, prior)
        self._hindsight = Hindsight(self._experience)
        self._correction, self._trace = self._experience.cost, open_trace()
        self._correction.follow(cost)
        self._branches = True
        self._drafted = 0  # tokens in the cache when a chain was last drafted
        self._steps = 0
        self._trials = self._experience.trials
        self._worth = [0.0] * (drafts + 1)
        self._rate = 0.0
        self._recent = (0.0, 0.0)  # decayed tokens and seconds of the steps so far
        self._priced: dict[Layout, float] = {}  # seconds of layouts in the next step
        self._planned = False  # solved when the context is known, or on first use

    @property
    def rate(self) -> float:
        """Tokens per second that the model's own drafter is expected to give."""
        if not self._planned:
            self._solve()
        return self._rate

    @property
    def _pace(self) -> float:
        """Tokens per second that a second spent here could have brought: the expected rate, or that of this text."""
        tokens, seconds = self._recent
        return max(self.rate, tokens / seconds) if seconds else self.rate

    @property
    def verdict(self) -> str:
        """The planner's current expectation as a sentence."""
        if not self._drafts:
            return ""
        plain = 1.0 / self._seconds(Layout.plain())
        if self.rate <= plain * MARGIN:
            return f"drafting by {self.own} does not pay off here; plain unless drafts are near certain"
        return f"drafting by {self.own} expected to give {self.rate / plain:.2f}x plain"

    def begin(self, context: int, *, branches: bool = True) -> None:
        """Plans for steps with `context` cached tokens; see `Policy`."""
        self._branches = branches
        self._hindsight.forget()
        if context != self._context or not self._planned:
            self._context = context
            self._priced.clear()
            self._solve()

    def choose(self, proposals: Sequence[Proposal]) -> tuple[Proposal, Layout]:
        """The drafts and the layout of the highest value; see `Policy`."""
        if not self._planned:
            self._solve()
        known = self._hindsight.calibrated(proposals)
        if self._correction.since_plain >= PLAIN_EVERY:
            return proposals[0].cut(0), Layout.plain()
        candidates = [merged(known)] if self._branches else [one.chained() for one in known]
        best = (1.0 - self._pace * self._seconds(Layout.plain()), proposals[0].cut(0), Layout.plain())
        for proposal in candidates:
            value, nodes, layout = self._best_layout(proposal.tree, self._pace)
            if value > best[0]:
                best = (value, proposal.keep(nodes), self._with_width(layout))
        if self.interrupts_plain() and not best[2].asks_for_drafts:
            full = replace(self._fullest(best[2].drafts), parents=best[2].parents)
            return best[1], self._with_width(full)
        return best[1], best[2]

    def observe(self, proposal: Proposal, layout: Layout, tokens: Sequence[int], seconds: float) -> None:
        """Learns acceptance and cost; see `Policy`."""
        if self._trace is not None:
            known = (self._seconds(layout), seconds, self._seconds(Layout.plain()))
            self._trace.write(traced(proposal, layout, tokens, self._context, known))
        if not layout.chain or self._context - self._drafted <= CATCHING_UP:
            self._correction.observe(layout, self._context, seconds)
        if layout.chain:
            self._drafted = self._context
        self._hindsight.verified(proposal.cut(layout.drafts), tokens)
        self._hindsight.read(tokens)
        self._context += len(tokens)
        self._priced.clear()
        self._steps += 1
        self._recent = _decayed(self._recent, len(tokens), seconds)
        gained = len(tokens) - self._pace * self._seconds(layout)
        tried = bool(self._drafts) and self._trials.count(layout.asks_for_drafts, gained)
        if tried or self._steps % SOLVE_EVERY == 0 or self._steps in SOLVE_EARLY:
            self._solve()

    def interrupts_plain(self) -> bool:
        """True while the model's own drafter is tried again; see `Policy`."""
        return self._drafts > 0 and self._trials.running

    def _seconds(self, layout: Layout) -> float:
        found = self._priced.get(layout)
        if found is None:
            found = self._correction.seconds(layout, self._context)
            self._priced[layout] = found
        return found

    def _with_width(self, layout: Layout) -> Layout:
        """The layout with candidates for every position that is drafted, if drafts may have branches."""
        return replace(layout, width=WIDTH) if self._branches and layout.asks_for_drafts else layout

    def _best_layout(self, tree: DraftTree, pace: float) -> tuple[float, list[int], Layout]:
        """(value, nodes to verify, layout) of the best layout; the likeliest paths are verified first.

        Args:
            tree: drafts with their chances by experience.
            pace: tokens that a second must bring.
        """
        paths = tree.path_chances
        order = sorted(range(len(tree)), key=lambda node: (-paths[node], node))
        order = [node for node in order if paths[node] >= LEAST_PATH]
        best: tuple[float, list[int], Layout] = (-1e9, [], Layout.plain())
        for count in _draft_counts(len(order)):
            nodes = sorted(order[:count])
            value, layout = self._with_slots(sum(paths[node] for node in nodes), ends_of(tree, nodes), pace)
            if value > best[0]:
                best = (value, nodes, layout)
        value, nodes, layout = best
        return value, nodes, replace(layout, parents=tree.keep(nodes).parents)

    def _fullest(self, drafts: int) -> Layout:
        """The layout that verifies `drafts` drafts and makes as many new ones as possible."""
        return Layout.linear(drafts, self._drafts)

    def _held_after(self, layout: Layout) -> Sequence[int]:
        """[drafts + 1] number of drafts at hand after a step, by the number accepted."""
        return layout.slots

    def _groups(self, drafts: int) -> range:
        """The real rows of a step with so many drafts behind which slots may stand."""
        return range(drafts + 1)

    def _with_slots(self, accepted: float, exact: Sequence[float], pace: float) -> tuple[float, Layout]:
        """(value, layout) after adding slots greedily, each to the group where it is worth most.

        Args:
            accepted: expected number of accepted drafts.
            exact: [drafts + 1] P(the accepted path ends at this real row).
            pace: tokens that a second must bring.
        """
        drafts = len(exact) - 1
        groups = self._groups(drafts)
        slots = [0] * (drafts + 1)
        worth, runs = self._worth, self._runs
        held_worth = 0.0
        best = (1.0 + accepted - pace * self._seconds(_with_groups(drafts, tuple(slots))), tuple(slots))
        idle = 0
        while idle < PATIENCE:
            group = max(groups, key=lambda row: exact[row] * runs[slots[row]][0])
            start, (gain, last) = slots[group], runs[slots[group]]
            if exact[group] * gain <= 1e-4:
                break
            while slots[group] < last:
                slots[group] += 1
                held = held_worth + exact[group] * (worth[slots[group]] - worth[start])
                value = 1.0 + accepted + held - pace * self._seconds(_with_groups(drafts, tuple(slots)))
                idle += 1
                if value > best[0]:
                    best, idle = (value, tuple(slots)), 0
            held_worth = held
        return best[0], _with_groups(drafts, best[1])

    def _solve(self) -> None:
        """Policy iteration for `rate` and `_worth`: evaluate the policy exactly and improve it, until stable."""
        self._planned = True
        held = self._held()
        plain = 1.0 / self._seconds(Layout.plain())
        policy = [[self._fullest(count) for _ in cases] for count, cases in enumerate(held)]
        best, last = (plain, [0.0] * (self._drafts + 1)), 0.0
        for _ in range(MOST_ITERATIONS):
            self._rate, self._worth = self._valued(policy, held)
            self._runs = _best_runs(self._worth)
            if self._rate > best[0] * MARGIN or best[0] > plain and self._rate > best[0]:
                best = (self._rate, self._worth)
            if self._rate <= last * (1 + 1e-9):
                break
            last = self._rate
            policy = [[self._best_layout(chain, last)[2] for _, chain in cases] for cases in held]
        self._rate, self._worth = best
        self._runs = _best_runs(self._worth)

    def _held(self) -> list[list[tuple[float, DraftTree]]]:
        """[drafts + 1] the chains that a step may hold, by their number of drafts: (share, chain) of each.

        Drafts of one number differ in the confidence of the first, so that a step may leave doubtful ones alone.
        """
        spreads = [self._hindsight.spread(self.own, depth + 1) for depth in range(self._drafts)]
        later = [sum(share * chance for share, chance in spread) for spread in spreads[1:]]
        held = [[(1.0, DraftTree.chain((), ()))]]
        for count in range(1, self._drafts + 1):
            held.append(
                [
                    (share, DraftTree.chain(range(count), [first, *later[: count - 1]]))
                    for share, first in spreads[0]
                ]
            )
        return held

    def _valued(
        self, policy: Sequence[Sequence[Layout]], held: Sequence[Sequence[tuple[float, DraftTree]]]
    ) -> tuple[float, list[float]]:
        """(rate, values [drafts + 1]) of a policy, from one linear system with values[0] = 0.

        Args:
            policy: [drafts + 1] the layouts used with each number of drafts at hand, for each of its chains.
            held: see `_held`.
        """
        states = len(policy)
        left, tokens = np.zeros((states + 1, states + 1)), np.zeros(states + 1)
        left[states, 0] = 1.0
        for count, cases in enumerate(held):
            left[count, count] += 1.0
            left[count, 0] -= RESTART
            for (share, chain), layout in zip(cases, policy[count], strict=True):
                reach = np.cumprod([1.0, *chain.chances[: layout.drafts]])
                tokens[count] += share * reach.sum()
                left[count, states] += share * self._seconds(layout)
                ends = np.append(reach[:-1] - reach[1:], reach[-1])
                for after, chance in zip(self._held_after(layout), ends, strict=True):
                    left[count, after] -= (1 - RESTART) * share * chance
        solution = np.linalg.solve(left, tokens)
        return float(solution[states]), solution[:states].tolist()


@lru_cache(maxsize=1 << 14)
def _with_groups(drafts: int, slots: tuple[int, ...]) -> Layout:
    """`Layout(drafts, slots)`: planning asks for the same ones again and again."""
    return Layout(drafts, slots)


def _decayed(recent: tuple[float, float], tokens: int, seconds: float) -> tuple[float, float]:
    """Tokens and seconds of the steps so far and of one more."""
    kept = 0.5 ** (1.0 / RECENT_STEPS)
    return kept * recent[0] + tokens, kept * recent[1] + seconds


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


class LinearBudgetPolicy(BudgetPolicy):
    """`BudgetPolicy` for models whose slots can stand behind the last draft only (`AttachedModel.why_linear`)."""

    def _groups(self, drafts: int) -> range:
        return range(drafts, drafts + 1)


class ChainBudgetPolicy(BudgetPolicy):
    """`BudgetPolicy` for drafts that are made one after another after the pass.

    The decision process is the same with other actions: a chain of k drafts follows every outcome and adds no rows to
    the pass, but each draft takes its own time. So a step takes the layout with the largest

        1 + E[accepted] - pace * c(drafts, k) + h(k).
    """

    def _fullest(self, drafts: int) -> Layout:
        return Layout.chained(drafts, self._drafts)

    def _held_after(self, layout: Layout) -> Sequence[int]:
        return (layout.chain,) * (layout.drafts + 1)

    def _with_slots(self, accepted: float, exact: Sequence[float], pace: float) -> tuple[float, Layout]:
        """(value, layout) of the best chain; arguments as in `BudgetPolicy._with_slots`."""
        best = (-1e9, Layout.plain())
        for chain in range(self._drafts + 1):
            layout = Layout.chained(len(exact) - 1, chain)
            value = 1.0 + accepted + self._worth[chain] - pace * self._seconds(layout)
            if value > best[0]:
                best = (value, layout)
        return best
