"""Proves that docs/checkpoints.md has the tables that the code says, and that what it says was checked is checked."""

from __future__ import annotations

import re
from pathlib import Path

import families_page
import pytest

from mtp_mlx.convert.heads.family_table import FAMILIES
from mtp_mlx.convert.heads.other_forms import LORA, MEDUSA, META, OTHER_FORMS
from tests.convert.heads.head_cases import CASES
from tests.convert.heads.parity_families import FAMILIES as WITH_AN_ORACLE


def test_the_page_is_current(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert families_page.main(["--check"]) == 0, "run python tools/families_page.py"
    text = families_page.PAGE.read_text(encoding="utf-8")
    monkeypatch.setattr(families_page, "PAGE", tmp_path / "checkpoints.md")
    families_page.PAGE.write_text(
        text.replace("| MiMo-7B | hidden |", "| MiMo-7B | embedding |"), encoding="utf-8"
    )
    assert families_page.main(["--check"]) == 1
    assert families_page.main([]) == 0 == families_page.main(["--check"])
    assert families_page.PAGE.read_text(encoding="utf-8") == text
    assert families_page.main(["--chek"]) == 2


def test_every_family_is_held_against_an_oracle() -> None:
    """Cascades in `test_parity_cascade`, Medusa and Meta in `test_parity_independent`, PEFT in `test_parity_peft`."""
    checked = {CASES[family.case].family for family in WITH_AN_ORACLE.values()}
    assert {family.convention.family for family in FAMILIES} == checked
    assert set(OTHER_FORMS) == {MEDUSA, META, LORA}


def test_where_runtimes_disagree_the_page_says_who_does_what() -> None:
    text = families_page.PAGE.read_text(encoding="utf-8").split(families_page.END)[1]
    reasons = text.split("What the choice rests on:")[1].split("`--head-norms`")[0]
    for family in FAMILIES:
        name = re.split(" / |, ", family.title)[0]
        assert not family.convention.unsettled or name in reasons, name
