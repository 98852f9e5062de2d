"""Which drafts a step verifies, and in which layout: the interface between the decode loop and a planner.

The loop offers one `Proposal` per drafter; the policy chooses one to verify and how the next drafts are made. The
loop knows nothing of costs, and a policy nothing of models.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Literal, Protocol

from mtp_mlx.decode.emission import sure_run
from mtp_mlx.decode.layout import Layout
from mtp_mlx.decode.lookup import LOOKUP
from mtp_mlx.decode.tree import DraftTree

LONG_MATCH = 0.5  # confidence of lookup from which its drafts go before those of a trained drafter

LayoutName = Literal["auto", "linear", "quadratic", "tree", "plain"]


@dataclass(frozen=True)
class Proposal:
    """One drafter's drafts for the next positions.

    Attributes:
        source: name of the drafter, as in `DraftSource.name` and `TextDrafter.name`.
        tree: the drafts.
        sources: [n] name of each draft's drafter, if they are not all of `source`.
    """

    source: str
    tree: DraftTree = DraftTree()
    sources: tuple[str, ...] = ()

    @classmethod
    def chain(cls, source: str, drafts: Sequence[int], confidences: Sequence[float]) -> Proposal:
        """Drafts without branches, nearest position first."""
        return cls(source, DraftTree.chain(drafts, confidences))

    @property
    def drafts(self) -> list[int]:
        """Token ids."""
        return list(self.tree.tokens)

    @property
    def confidences(self) -> list[float]:
        """One per draft, in [0, 1]."""
        return list(self.tree.chances)

    def expected(self) -> float:
        """How many drafts of a chain are right by its confidences."""
        return sum(accumulate(self.confidences, operator.mul))

    def cut(self, most: int) -> Proposal:
        """The same proposal with at most `most` drafts."""
        return Proposal(self.source, self.tree.cut(most), self.sources[: max(most, 0)])

    def keep(self, nodes: Sequence[int]) -> Proposal:
        """The same proposal with these drafts only; see `DraftTree.keep`."""
        sources = tuple(self.sources[node] for node in nodes) if self.sources else ()
        return Proposal(self.source, self.tree.keep(nodes), sources)

    def chained(self) -> Proposal:
        """The same proposal without branches."""
        return self if self.tree.is_chain else self.keep(self.tree.likeliest_path())

    def source_of(self, node: int) -> str:
        """Name of the drafter of a draft."""
        return self.sources[node] if self.sources else self.source


def without_branches(proposal: Proposal, layout: Layout) -> tuple[Proposal, Layout]:
    """The likeliest chain of a tree and its layout, for sequences that verify chains only."""
    nodes = proposal.tree.likeliest_path()
    slots = tuple(layout.slots[row] for row in (0, *(node + 1 for node in nodes)))
    return proposal.keep(nodes), Layout(len(nodes), slots, layout.chain)


class Policy(Protocol):
    """Chooses what each step verifies.

    Attributes:
        max_drafts: most drafts of a proposal.
        own_drafts: most drafts per step that its layouts ask of the model's own drafter; 0 if none.
    """

    max_drafts: int
    own_drafts: int

    @property
    def verdict(self) -> str:
        """A sentence on what it found out, for people; empty if there is none."""
        ...

    def begin(self, context: int, *, branches: bool = True) -> None:
        """Called before the first step it chooses, and again after steps chosen elsewhere.

        Args:
            context: tokens in the cache.
            branches: whether this sequence can verify drafts with branches.
        """
        ...

    def choose(self, proposals: Sequence[Proposal]) -> tuple[Proposal, Layout]:
        """The proposal to verify and the layout; proposals[0] is from the model's own drafter, and may be empty."""
        ...

    def observe(self, proposal: Proposal, layout: Layout, tokens: Sequence[int], seconds: float) -> None:
        """Called after every step with the tokens that it committed and the seconds that it took.

        Args:
            proposal: as chosen.
            layout: as chosen.
            tokens: the accepted drafts and the target's own pick.
            seconds: of the step.
        """
        ...

    def interrupts_plain(self) -> bool:
        """Whether to end a stretch of plain steps and call `choose` again."""
        ...


def preferred(proposals: Sequence[Proposal]) -> Proposal:
    """The lookup proposal after a long match; otherwise the one of which most drafts are expected to be right."""
    matches = (p for p in proposals if p.source == LOOKUP and p.drafts)
    found = next((p for p in matches if p.confidences[0] >= LONG_MATCH), None)
    return found or max(proposals, key=Proposal.expected)


class FixedPolicy:
    """Always the same layout: plain, linear or quadratic with k slots.

    Verifies lookup drafts if there are any, otherwise those from the slots.
    """

    def __init__(self, name: Literal["linear", "quadratic", "plain"], slots: int) -> None:
        self.name, self.slots = name, slots
        self.max_drafts = self.own_drafts = 0 if name == "plain" else slots
        self.verdict = ""

    def begin(self, context: int, *, branches: bool = True) -> None:
        """Nothing to plan."""

    def choose(self, proposals: Sequence[Proposal]) -> tuple[Proposal, Layout]:
        """See `Policy`."""
        best = preferred(proposals).cut(self.max_drafts)
        if self.name == "plain":
            return best, Layout.plain()
        build = Layout.linear if self.name == "linear" else Layout.quadratic
        return best, build(len(best.drafts), self.slots)

    def observe(self, proposal: Proposal, layout: Layout, tokens: Sequence[int], seconds: float) -> None:
        """Nothing to learn."""

    def interrupts_plain(self) -> bool:
        """Never: its layout does not change."""
        return False


class ConfidencePolicy:
    """A fixed layout that verifies only the leading run of slot drafts with confidence >= tau.

    Doubtful drafts are not submitted, so a step has fewer rows. The text is the same.
    """

    def __init__(self, fixed: FixedPolicy, tau: float) -> None:
        self._fixed, self._tau = fixed, tau
        self.max_drafts, self.own_drafts, self.verdict = fixed.max_drafts, fixed.own_drafts, ""

    def begin(self, context: int, *, branches: bool = True) -> None:
        """Nothing to plan."""

    def choose(self, proposals: Sequence[Proposal]) -> tuple[Proposal, Layout]:
        """See `Policy`."""
        own, *others = proposals
        return self._fixed.choose([own.cut(sure_run(own.confidences, self._tau)), *others])

    def observe(self, proposal: Proposal, layout: Layout, tokens: Sequence[int], seconds: float) -> None:
        """Nothing to learn."""

    def interrupts_plain(self) -> bool:
        """Never: it has no plain steps."""
        return False


class ChainPolicy:
    """Drafts `drafts` tokens after every pass and verifies all of them in the next.

    Verifies lookup drafts instead if there are any.
    """

    def __init__(self, drafts: int) -> None:
        self.max_drafts = self.own_drafts = drafts
        self.verdict = ""

    def begin(self, context: int, *, branches: bool = True) -> None:
        """Nothing to plan."""

    def choose(self, proposals: Sequence[Proposal]) -> tuple[Proposal, Layout]:
        """See `Policy`."""
        best = preferred(proposals).cut(self.max_drafts)
        return best, Layout.chained(len(best.drafts), self.own_drafts)

    def observe(self, proposal: Proposal, layout: Layout, tokens: Sequence[int], seconds: float) -> None:
        """Nothing to learn."""

    def interrupts_plain(self) -> bool:
        """Never: it has no plain steps."""
        return False


class LookupPolicy:
    """Verifies lookup drafts only, at most `drafts` per step, and decodes plainly if there are none."""

    def __init__(self, drafts: int) -> None:
        self.max_drafts, self.own_drafts, self.verdict = drafts, 0, ""

    def begin(self, context: int, *, branches: bool = True) -> None:
        """Nothing to plan."""

    def choose(self, proposals: Sequence[Proposal]) -> tuple[Proposal, Layout]:
        """See `Policy`."""
        best = preferred(proposals).cut(self.max_drafts)
        return best, Layout(len(best.drafts), (0,) * (len(best.drafts) + 1))

    def observe(self, proposal: Proposal, layout: Layout, tokens: Sequence[int], seconds: float) -> None:
        """Nothing to learn."""

    def interrupts_plain(self) -> bool:
        """Never: the loop itself ends a plain stretch when lookup finds a match."""
        return False
