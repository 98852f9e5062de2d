"""The layout of a step: how many drafts it verifies, and how the next ones are made.

The next drafts come from slots, placed after every possible acceptance length, or from a chain that is drafted after
the pass and adds no rows to it.

Contract: a `Layout` holds counts only; token ids, positions and visibility belong to `Block`.
Invariant: real rows (the pending token and the drafts) come first, then slot rows in `drafts + 1` groups. Group a
drafts if exactly a drafts are accepted, so every outcome has its group, including zero.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Layout:
    """The row counts of one step.

    Attributes:
        drafts: d, the number of drafts to verify.
        slots: [d + 1] slots per group; slots[a] drafts are made if exactly a drafts are accepted.
        chain: drafts made one after another after the pass, whatever was accepted; excludes slots.

    Raises:
        ValueError: if a count is negative, the number of groups is not d + 1, or there are both slots and a chain.
    """

    drafts: int
    slots: tuple[int, ...]
    chain: int = 0

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
