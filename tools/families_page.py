"""Writes the tables of families in docs/checkpoints.md from the converter's own.

python tools/families_page.py            writes the page
python tools/families_page.py --check    exit code 1 if the page differs from what would be written
"""

from __future__ import annotations

import sys
from pathlib import Path

from mtp_mlx.convert.heads.family_table import FAMILIES, REFUSED, Family
from mtp_mlx.convert.heads.other_forms import OTHER_FORMS, Form
from mtp_mlx.drafters.heads.convention import HeadConvention

PAGE = Path(__file__).parents[1] / "docs" / "checkpoints.md"
BEGIN = "<!-- families: written by `python tools/families_page.py`; a test compares -->"
END = "<!-- end of families -->"
FIRST = {
    "post-norm": "trunk's, after its last norm",
    "pre-norm": "trunk's, before its last norm",
    "before-last-layer": "trunk's, before its last layer",
}
FURTHER = {
    "normed": "head's, after its norm",
    "raw": "head's, before its norm",
    "trunk": "as the first",
    "none": "",
}


def tables() -> str:
    """What the families are; how the heads that have conventions are stored and run; what is refused."""
    named = [(family, family.names.fuse) for family in FAMILIES] + [(form, form.name) for form in OTHER_FORMS]
    known = [[family.title, family.form, f"`{name}`", own_parts(family.convention)] for family, name in named]
    run = [convention_cells(family) for family, _ in named if family.convention.kind != "lora"]
    return "\n\n".join(
        [
            table(["family", "heads", "one of the names", "own parts"], known),
            "Recognised, but refused:\n" + "\n".join(f"- {title}" for title in REFUSED.values()),
            table(
                [
                    "family",
                    "fuse weight begins with",
                    "norms",
                    "state for the first draft",
                    "for further drafts",
                    "position 0",
                ],
                run,
            ),
        ]
    )


def table(columns: list[str], rows: list[list[str]]) -> str:
    """A table of Markdown."""
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("|" + "|".join(f" {cell} " if cell else " " for cell in cells) + "|" for cells in lines)


def own_parts(convention: HeadConvention) -> str:
    """Which matrices the heads do not share with the trunk."""
    own = {"embedding": convention.embedding, "LM head": convention.lm_head}
    return ", ".join(part for part, whose in own.items() if whose == "own")


def convention_cells(family: Family | Form) -> list[str]:
    """A family's convention; a star where published runtimes disagree."""
    convention = family.convention
    cascade = convention.kind == "cascade"

    def cell(field: str, text: str) -> str:
        return f"{text} \\*" if field in convention.unsettled else text

    return [
        family.title,
        convention.stored_order if cascade else "",
        cell("output_norm", norms(family)),
        cell("first_hidden", FIRST[convention.first_hidden]),
        cell("recycled_hidden", FURTHER[convention.recycled_hidden]),
        cell("mask_first_position", "zeros" if convention.mask_first_position else "as it is")
        if cascade
        else "",
    ]


def norms(family: Family | Form) -> str:
    """How norms are stored, and whose the last one is."""
    convention = family.convention
    if convention.kind == "medusa":
        return ""
    if isinstance(family, Family) and family.as_modelled:
        return "as the model's"
    stored = "around zero" if convention.zero_centred_norms else "plain"
    return f"{stored}, the trunk's at the end" if convention.output_norm == "trunk" else stored


def page(current: str) -> str:
    """`current` with the table between its markers."""
    before, rest = current.split(BEGIN)
    return f"{before}{BEGIN}\n\n{tables()}\n\n{END}{rest.split(END)[1]}"


def main(arguments: list[str]) -> int:
    if arguments not in ([], ["--check"]):
        print("usage: python tools/families_page.py [--check]", file=sys.stderr)
        return 2
    current = PAGE.read_text(encoding="utf-8")
    if current == page(current):
        return 0
    if arguments:
        print(f"{PAGE} is not current: run python tools/families_page.py", file=sys.stderr)
        return 1
    PAGE.write_text(page(current), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
