"""How many drafts a step verifies, and what makes the next ones: slots behind every possible acceptance length,
or a chain that is drafted behind the pass and needs no rows in it.

Contract: a `Layout` is counts only. It knows nothing of token ids, positions or visibility; a `Block` builds
those.
Invariant: real rows (the pending token and the drafts) come first, slot rows after, in `drafts + 1` groups.
Group a is the one drafted from when exactly a drafts were accepted, so every outcome owns a group, zero
included.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Layout:
    """The row counts of one step.

    drafts  d, the number of drafts under verification
    slots   [d + 1] slots of each group; slots[a] drafts are made when exactly a drafts were accepted
    chain   drafts made one after another behind the pass, whatever was accepted; then there are no slots

    Raises ValueError for a negative count, another number of groups, or slots and a chain at once.
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
            raise ValueError(f"a chain of {self.chain} drafts does not go with slots {self.slots}")

    @property
    def real_rows(self) -> int:
        """Rows whose token is known: the pending token and the drafts."""
        return 1 + self.drafts

    @property
    def slot_rows(self) -> int:
        """Mask slots of all groups together."""
        return sum(self.slots)

    @property
    def asks_for_drafts(self) -> bool:
        """Fresh drafts are to be made, by slots or behind the pass."""
        return self.chain > 0 or self.slot_rows > 0

    @property
    def rows(self) -> int:
        """All rows of the block, real and slot, without those of `lead_rows`."""
        return self.real_rows + self.slot_rows

    def lead_rows(self, lead: int) -> int:
        """Rows that draft nothing where every slot group that is not empty starts with `lead` of them."""
        return lead * sum(count > 0 for count in self.slots)

    @classmethod
    def plain(cls) -> Layout:
        """One row: ordinary decoding."""
        return cls(0, (0,))

    @classmethod
    def chained(cls, drafts: int, chain: int) -> Layout:
        """`chain` drafts made behind the pass after every outcome: 1 + drafts rows."""
        return cls(drafts, (0,) * (drafts + 1), chain)

    @classmethod
    def linear(cls, drafts: int, k: int) -> Layout:
        """k slots behind the last draft only: 1 + drafts + k rows, 2k + 1 in steady state.

        5 / 9 / 17 rows for k = 2 / 4 / 8. Apple's linear decoding (arXiv 2507.11851 section 2.4): a rejection
        voids the step's slots, and the next step has no drafts to verify.
        """
        return cls(drafts, (0,) * drafts + (k,))

    @classmethod
    def quadratic(cls, drafts: int, k: int) -> Layout:
        """k slots behind every acceptance length: (drafts + 1)(k + 1) rows, (k + 1)^2 in steady state.

        9 / 25 / 81 rows for k = 2 / 4 / 8. Apple's quadratic decoding (arXiv 2507.11851 section 2.4) has k^2
        slots, one group behind each draft and none behind the pending token (7 / 21 / 73 rows), so that its
        commonest rejection, at the first draft, leaves no drafts. The group for acceptance length zero is
        this project's correction: k fresh drafts after every outcome.
        """
        return cls(drafts, (k,) * (drafts + 1))
