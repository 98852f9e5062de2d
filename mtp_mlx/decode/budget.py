"""The planner behind `--layout auto`: as many drafts and slots as pay, none when nothing pays (design 2.5).

Decoding is a Markov decision process whose state is the drafts at hand. A step costs c(rows) seconds and
earns 1 + accepted tokens; slots behind acceptance length a are the drafts of the next step if exactly a are
accepted. The rate lambda (tokens per second) and the worth h(n) of holding n slot drafts are found by value
iteration; a step then takes the layout with the largest

    1 + E[accepted] - lambda * c(layout) + sum_a P(accept exactly a) * h(slots[a]),

slots being given one by one to the group where the next one is worth most. Plain decoding is one of the
layouts: when no slots pay, `auto` decodes plainly and asks the adapter again only now and then, at growing
distances, because acceptance changes with the text.
"""

from __future__ import annotations

from collections.abc import Sequence

from mtp_mlx.decode.acceptance import AcceptanceEstimate
from mtp_mlx.decode.cost import StepCost
from mtp_mlx.decode.layout import Layout
from mtp_mlx.decode.policy import Proposal

SOLVE_EVERY = 24  # steps between value iterations
FIRST_PROBE, LAST_PROBE = 48, 768  # plain steps before slots are tried again: first, and at most
LOOKUP_DRAFTS = 23
LOOKUP_PRIOR = (0.45, 0.75, 0.85, 0.9)
PATIENCE = 8  # slots added without gain before giving up: the cost curve has steps, not hills
MARGIN = 1.03  # a speculative layout must promise this much more than plain, or estimates' noise decides


def fresh_estimates(slots: int, prior: Sequence[float]) -> dict[str, AcceptanceEstimate]:
    """Acceptance by drafter before anything was seen. Shared by a model's generations, it keeps learning."""
    return {
        "slots": AcceptanceEstimate(max(slots, 1), list(prior) or None),
        "lookup": AcceptanceEstimate(LOOKUP_DRAFTS, LOOKUP_PRIOR, memory=60.0),
    }


class BudgetPolicy:
    """See the module. Implements `mtp_mlx.decode.policy.Policy`.

    Args:
        cost: measured seconds of steps.
        slots: most slots behind one position; 0 without an adapter.
        prior: the adapter's recorded acceptance per depth.
        context: tokens cached when decoding starts.
        acceptance: estimates of an earlier generation to go on from, by drafter; see `fresh_estimates`.
    """

    def __init__(
        self,
        cost: StepCost,
        slots: int,
        prior: Sequence[float],
        context: int = 0,
        acceptance: dict[str, AcceptanceEstimate] | None = None,
    ) -> None:
        self._cost, self._slots, self._context = cost, slots, context
        self.max_drafts = max(LOOKUP_DRAFTS, slots)
        self._acceptance = acceptance or fresh_estimates(slots, prior)
        self._steps = 0
        self._plain_steps = 0
        self._probe_after = FIRST_PROBE
        self._probing = False
        self._worth = [0.0] * (slots + 1)
        self.rate = 0.0
        self._solve(rounds=40)

    @property
    def verdict(self) -> str:
        """What the planner currently thinks, for people."""
        plain = 1.0 / self._seconds(Layout.plain())
        if self.rate <= plain * MARGIN:
            return "plain decoding: slots do not pay on this machine with this text"
        return f"slots pay: about {self.rate / plain:.2f}x plain expected"

    # --- Policy -------------------------------------------------------------------------------------------

    def choose(self, proposals: Sequence[Proposal]) -> tuple[Proposal, Layout]:
        """The proposal and layout worth most; see `Policy`."""
        if self._probing and self._slots:
            self._probing = False
            return proposals[0].cut(0), Layout(0, (self._slots,))
        best = (self._plain_value(), proposals[0].cut(0), Layout.plain())
        for proposal in proposals:
            known = self._acceptance[proposal.source]
            chances = [known.probability(i + 1, c) for i, c in enumerate(proposal.confidences)]
            value, layout = self._best_layout(chances)
            if value > best[0]:
                best = (value, proposal, layout)
        return best[1], best[2]

    def observe(self, proposal: Proposal, layout: Layout, n_accepted: int) -> None:
        """Learns acceptance; see `Policy`."""
        self._context += 1 + n_accepted
        self._steps += 1
        if layout == Layout.plain():
            self._plain_steps += 1
        elif layout.drafts:
            known = self._acceptance[proposal.source]
            known.update(layout.drafts, n_accepted, proposal.confidences)
            if proposal.source == "slots":
                paid = 1 + n_accepted > self.rate * self._seconds(layout)
                self._probe_after = FIRST_PROBE if paid else min(2 * self._probe_after, LAST_PROBE)
        if self._steps % SOLVE_EVERY == 0:
            self._solve(rounds=6)

    def interrupts_plain(self) -> bool:
        """True when slots were not tried for a while; see `Policy`."""
        if self._slots and self._plain_steps >= self._probe_after:
            self._plain_steps = 0
            self._probing = True
        return self._probing

    # --- values -------------------------------------------------------------------------------------------

    def _seconds(self, layout: Layout) -> float:
        return self._cost.seconds(layout, self._context)

    def _plain_value(self) -> float:
        return 1.0 - self.rate * self._seconds(Layout.plain())

    def _best_layout(self, chances: Sequence[float]) -> tuple[float, Layout]:
        """The layout worth most for drafts that are accepted with these chances, each given the one before."""
        best = (-1e9, Layout.plain())
        reach = [1.0]  # P(at least a accepted)
        for chance in chances:
            reach.append(reach[-1] * chance)
        for drafts in _draft_counts(len(chances)):
            exact = [reach[a] - reach[a + 1] for a in range(drafts)] + [reach[drafts]]
            value, layout = self._with_slots(sum(reach[1 : drafts + 1]), exact)
            if layout != Layout.plain() and value > best[0]:
                best = (value, layout)
            if drafts and reach[drafts] < 0.02:
                break
        return best[0] / MARGIN if best[0] > 0 else best[0] * MARGIN, best[1]

    def _with_slots(self, accepted: float, exact: Sequence[float]) -> tuple[float, Layout]:
        """Gives slots one by one to the group where the next is worth most, and keeps the best number."""
        drafts = len(exact) - 1
        slots = [0] * (drafts + 1)
        worth = self._worth
        held = 0.0
        best = (1.0 + accepted - self.rate * self._seconds(Layout(drafts, tuple(slots))), tuple(slots))
        idle = 0
        while idle < PATIENCE:
            gains = [
                exact[a] * (worth[slots[a] + 1] - worth[slots[a]]) if slots[a] < self._slots else -1.0
                for a in range(drafts + 1)
            ]
            group = max(range(drafts + 1), key=gains.__getitem__)
            if gains[group] <= 1e-4:
                break
            slots[group] += 1
            held += gains[group]
            value = 1.0 + accepted + held - self.rate * self._seconds(Layout(drafts, tuple(slots)))
            idle += 1
            if value > best[0]:
                best, idle = (value, tuple(slots)), 0
        return best[0], Layout(drafts, best[1])

    def _solve(self, rounds: int) -> None:
        """Value iteration for `rate` and `_worth`, from where the last one ended."""
        known = self._acceptance["slots"]
        plain = 1.0 / self._seconds(Layout.plain())
        self.rate = max(self.rate, plain)
        for _ in range(rounds):
            values = [self._plain_value()]
            for held in range(self._slots + 1):
                chances = [known.probability(depth + 1) for depth in range(held)]
                values.append(self._best_layout(chances)[0])
            # values[0]: plain; values[1 + n]: best with n drafts at hand. Everything is relative to state 0.
            start = max(values[0], values[1])
            self._worth = [max(values[0], value) - start for value in values[1:]] or [0.0]
            self.rate = max(plain, self.rate + 0.5 * start / self._seconds(Layout.plain()))


def _draft_counts(most: int) -> list[int]:
    """Numbers of drafts worth comparing: every one up to 4, then some, and all."""
    return [count for count in range(most + 1) if count <= 4 or count in (6, 8, 11, 15, 19) or count == most]
