"""The layout of a step: which drafts it verifies, and how the next ones are made.

The drafts are a chain or a tree. The next ones come from slots, placed after every possible end of the accepted path,
or from a chain that is drafted after the pass and adds no rows to it.

Contract: a `Layout` holds counts and parents only; token ids, positions and visibility belong to `Block`.
Invariant: real rows (the pending token and the drafts) come first, then slot rows in `drafts + 1` groups. Group r
drafts if the accepted path ends at real row r, so every outcome has its group, including zero. In a chain r is the
number of accepted drafts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from mtp_mlx.decode.tree import ROOT, depths_of


@dataclass(frozen=True)
class Layout:
    """The row counts of one step.

    Attributes:
        drafts: d, the number of drafts to verify.
        slots: [d + 1] slots per group; slots[r] positions are drafted if the accepted path ends at real row r.
        chain: drafts made one after another after the pass, whatever was accepted; excludes slots.
        parents: [d] index of each draft's parent, smaller than its own, `ROOT` for the pending token; empty if each
            draft follows the one before it.
        width: candidates per position that slots draft at most; 1 for a chain.

    Raises:
        ValueError: if a count is negative, the number of groups is not d + 1, there are both slots and a chain, or
            the parents are not those of d drafts.
    """

    drafts: int
    slots: tuple[int, ...]
    chain: int = 0
    parents: tuple[int, ...] = ()
    width: int = 1

    def __post_init__(self) -> None:
        if self.drafts < 0:
            raise ValueError(f"a layout cannot verify {self.drafts} drafts")
        if len(self.slots) != self.drafts + 1:
            raise ValueError(
                f"{self.drafts} drafts need {self.drafts + 1} slot groups, not {len(self.slots)}"
            )
        if any(count < 0 for count in self.slots):
            raise ValueError(f"slot counts must not be negative: {self.slots}")
        if self.chain < 0 or (self.chain and any(self.slots)):
            raise ValueError(f"a chain of {self.chain} drafts cannot be combined with slots {self.slots}")
        if self.parents and len(self.parents) != self.drafts:
            raise ValueError(f"{self.drafts} drafts have {self.drafts} parents, not {len(self.parents)}")
        if self.width < 1:
            raise ValueError(f"slots draft at least one candidate a position, not {self.width}")
        depths_of(self.parents)
        if self.parents == tuple(range(ROOT, self.drafts - 1)):
            object.__setattr__(self, "parents", ())  # a chain has one name

    @property
    def depth(self) -> int:
        """Drafts on the longest path from the pending token, which is most that can be accepted."""
        return max(depths_of(self.parents), default=self.drafts)

    def continues(self, row: int) -> bool:
        """Whether a draft follows real row `row`."""
        return row - 1 in self.parents if self.parents else row < self.drafts

    @property
    def real_rows(self) -> int:
        """Rows with a known token: the pending token and the drafts."""
        return 1 + self.drafts

    @property
    def slot_rows(self) -> int:
        """Slots in all groups together."""
        return sum(self.slots)

    @property
    def asks_for_drafts(self) -> bool:
        """Whether the step makes new drafts, from slots or as a chain."""
        return self.chain > 0 or self.slot_rows > 0

    @property
    def rows(self) -> int:
        """All real and slot rows of the block, not counting `lead_rows`."""
        return self.real_rows + self.slot_rows

    def lead_rows(self, lead: int) -> int:
        """Rows that draft nothing: `lead` at the start of every slot group that is not empty."""
        return lead * sum(count > 0 for count in self.slots)

    @classmethod
    def plain(cls) -> Layout:
        """One row: ordinary decoding."""
        return cls(0, (0,))

    @classmethod
    def chained(cls, drafts: int, chain: int) -> Layout:
        """`chain` drafts made after the pass, whatever was accepted: 1 + drafts rows."""
        return cls(drafts, (0,) * (drafts + 1), chain)

    @classmethod
    def linear(cls, drafts: int, k: int) -> Layout:
        """k slots after the last draft only: 1 + drafts + k rows, 2k + 1 in steady state.

        5 / 9 / 17 rows for k = 2 / 4 / 8. Apple's linear decoding (arXiv 2507.11851, section 2.4): a rejection makes
        the step's slots useless, so the next step has no drafts to verify.
        """
        return cls(drafts, (0,) * drafts + (k,))

    @classmethod
    def quadratic(cls, drafts: int, k: int) -> Layout:
        """k slots after every acceptance length: (drafts + 1)(k + 1) rows, (k + 1)^2 in steady state.

        9 / 25 / 81 rows for k = 2 / 4 / 8. Apple's quadratic decoding (arXiv 2507.11851, section 2.4) has k^2 slots,
        one group after each draft and none after the pending token (7 / 21 / 73 rows), so a rejection of the first
        draft, the most frequent one, leaves no drafts for the next step. This project adds the group for acceptance
        length zero, so there are k new drafts after every outcome.
        """
        return cls(drafts, (k,) * (drafts + 1))

    @classmethod
    def tree(cls, parents: Sequence[int], slots: Sequence[int], width: int) -> Layout:
        """Drafts with these parents, and slots after each row; see `Layout`. 1 + drafts + sum(slots) rows."""
        return cls(len(parents), tuple(slots), parents=tuple(parents), width=width)
