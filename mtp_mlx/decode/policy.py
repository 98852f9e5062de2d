"""Which drafts a step verifies and in which layout: the seam between the decode loop and a planner.

The loop offers one `Proposal` per drafter and is told which to verify, and how many slots to add. The loop
knows nothing of costs; a policy knows nothing of models.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from mtp_mlx.decode.emission import sure_run
from mtp_mlx.decode.layout import Layout
from mtp_mlx.decode.lookup import LOOKUP
from mtp_mlx.decode.tree import DraftTree

LayoutName = Literal["auto", "linear", "quadratic", "plain"]


@dataclass(frozen=True)
class Proposal:
    """Drafts of one drafter for the next positions.

    Attributes:
        source: name of the drafter, as in `DraftSource.name`, or "lookup".
        tree: the drafts.
    """

    source: str
    tree: DraftTree = DraftTree()

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

    def cut(self, most: int) -> Proposal:
        """At most `most` drafts."""
        return Proposal(self.source, self.tree.cut(most))


class Policy(Protocol):
    """Decides steps.

    Attributes:
        max_drafts: bounds what drafters are asked for.
        own_drafts: most drafts that its layouts ask of the model's own drafter; 0 where they ask for none.
    """

    max_drafts: int
    own_drafts: int

    @property
    def verdict(self) -> str:
        """What it found out, for people; empty if there is nothing to find out."""
        ...

    def begin(self, context: int) -> None:
        """Told before the first step that it decides, and again after steps that others decided.

        Args:
            context: tokens cached by now.
        """
        ...

    def choose(self, proposals: Sequence[Proposal]) -> tuple[Proposal, Layout]:
        """The proposal to verify and the layout; proposals[0] is the model's own drafter's (possibly empty)."""
        ...

    def observe(self, proposal: Proposal, layout: Layout, n_accepted: int, seconds: float) -> None:
        """Told after every step what came of it, and how many seconds it took the decode loop."""
        ...

    def interrupts_plain(self) -> bool:
        """Whether a stretch of plain steps should end so that `choose` is asked again."""
        ...


def preferred(proposals: Sequence[Proposal]) -> Proposal:
    """The text's own drafts where it has a match, since they cost nothing; otherwise the model's own drafter's."""
    return next((p for p in proposals if p.source == LOOKUP and p.drafts), proposals[0])


class FixedPolicy:
    """Always the same layout: plain, or k slots behind every step in linear or quadratic form.

    Where the text has a match its drafts are verified, otherwise the slots'.
    """

    def __init__(self, name: Literal["linear", "quadratic", "plain"], slots: int) -> None:
        self.name, self.slots = name, slots
        self.max_drafts = self.own_drafts = 0 if name == "plain" else slots
        self.verdict = ""

    def begin(self, context: int) -> None:
        """Nothing to plan."""

    def choose(self, proposals: Sequence[Proposal]) -> tuple[Proposal, Layout]:
        """See `Policy`."""
        best = preferred(proposals).cut(self.max_drafts)
        if self.name == "plain":
            return best, Layout.plain()
        build = Layout.linear if self.name == "linear" else Layout.quadratic
        return best, build(len(best.drafts), self.slots)

    def observe(self, proposal: Proposal, layout: Layout, n_accepted: int, seconds: float) -> None:
        """Nothing to learn."""

    def interrupts_plain(self) -> bool:
        """Never: plain means plain."""
        return False


class ConfidencePolicy:
    """A fixed layout that submits only the slots' leading drafts of confidence >= tau for verification.

    What is not submitted cannot be rejected, so a step has fewer rows; the text is the same (equality rule).
    """

    def __init__(self, fixed: FixedPolicy, tau: float) -> None:
        self._fixed, self._tau = fixed, tau
        self.max_drafts, self.own_drafts, self.verdict = fixed.max_drafts, fixed.own_drafts, ""

    def begin(self, context: int) -> None:
        """Nothing to plan."""

    def choose(self, proposals: Sequence[Proposal]) -> tuple[Proposal, Layout]:
        """See `Policy`."""
        own, *others = proposals
        return self._fixed.choose([own.cut(sure_run(own.confidences, self._tau)), *others])

    def observe(self, proposal: Proposal, layout: Layout, n_accepted: int, seconds: float) -> None:
        """Nothing to learn."""

    def interrupts_plain(self) -> bool:
        """Never: it has no plain steps."""
        return False


class ChainPolicy:
    """`drafts` tokens are drafted behind every step, and all of them are verified.

    Where the text has a match its drafts are verified, otherwise the model's own drafter's.
    """

    def __init__(self, drafts: int) -> None:
        self.max_drafts = self.own_drafts = drafts
        self.verdict = ""

    def begin(self, context: int) -> None:
        """Nothing to plan."""

    def choose(self, proposals: Sequence[Proposal]) -> tuple[Proposal, Layout]:
        """See `Policy`."""
        best = preferred(proposals).cut(self.max_drafts)
        return best, Layout.chained(len(best.drafts), self.own_drafts)

    def observe(self, proposal: Proposal, layout: Layout, n_accepted: int, seconds: float) -> None:
        """Nothing to learn."""

    def interrupts_plain(self) -> bool:
        """Never: it has no plain steps."""
        return False


class LookupPolicy:
    """Verifies what the text drafts, at most `drafts` tokens in a step; where it has no match, decodes plainly."""

    def __init__(self, drafts: int) -> None:
        self.max_drafts, self.own_drafts, self.verdict = drafts, 0, ""

    def begin(self, context: int) -> None:
        """Nothing to plan."""

    def choose(self, proposals: Sequence[Proposal]) -> tuple[Proposal, Layout]:
        """See `Policy`."""
        best = preferred(proposals).cut(self.max_drafts)
        return best, Layout(len(best.drafts), (0,) * (len(best.drafts) + 1))

    def observe(self, proposal: Proposal, layout: Layout, n_accepted: int, seconds: float) -> None:
        """Nothing to learn."""

    def interrupts_plain(self) -> bool:
        """Never by itself: a match in the text ends a plain stretch."""
        return False
