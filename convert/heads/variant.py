"""The conventions of heads that may be wrong without an error, as one value. Needs no mlx."""

from __future__ import annotations

from dataclasses import dataclass

from mtp_mlx.drafters.heads.convention import HeadConvention


@dataclass(frozen=True)
class Variant:
    """The conventions that may be wrong without an error, named as in `HeadConvention`."""

    first_hidden: str
    stored_order: str
    zero_centred_norms: bool
    mixed_norms: bool = False

    @classmethod
    def of(cls, convention: HeadConvention) -> Variant:
        """The variant that a convention describes."""
        order, zero_centred = convention.stored_order, convention.zero_centred_norms
        return cls(convention.first_hidden, order, zero_centred, convention.mixed_norms)

    @property
    def norms(self) -> str:
        """How norms are stored, as `Overrides.head_norms` calls it."""
        return "mixed" if self.mixed_norms else "zero-centred" if self.zero_centred_norms else "plain"

    def adds_one(self, name: str) -> bool:
        """Whether 1 is added to the norm `name` of a head."""
        return self.zero_centred_norms or (self.mixed_norms and name.startswith("block."))

    def __str__(self) -> str:
        return f"{self.first_hidden} hidden, {self.stored_order} first, {self.norms} norms"


def how_to_mend(written: Variant, better: Variant) -> str:
    """The arguments of a conversion under the better one."""
    options = []
    if better.norms != written.norms:
        options.append(f"`head_norms` {better.norms}")
    if better.stored_order != written.stored_order:
        options.append(f"`head_order` {better.stored_order}")
    if better.first_hidden != written.first_hidden:
        options.append(f"`head_hidden` {better.first_hidden}")
    return f"convert again with {' '.join(options)}"
