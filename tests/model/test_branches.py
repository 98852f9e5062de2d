"""Models whose rows may stand anywhere verify trees; those that number rows by themselves are found and do not."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import pytest

from mtp_mlx.model import branches
from mtp_mlx.model.attach import attach
from mtp_mlx.model.branches import why_no_branches
from mtp_mlx.model.positions import PositionedRoPE
from tests.tiny import ARCHITECTURES, SPECIFIC, WINDOWED, tiny_model

BY_THEMSELVES = {"llama4", "ministral3"}


@pytest.mark.parametrize("name", sorted({*ARCHITECTURES, *WINDOWED} - BY_THEMSELVES))
def test_models_with_rotary_embeddings_take_branches(name: str) -> None:
    model = attach(tiny_model(name, seed=3))
    assert why_no_branches(model) == "" == model.branches


@pytest.mark.parametrize("name", sorted(BY_THEMSELVES & {*SPECIFIC}))
def test_models_that_number_rows_are_found(name: str) -> None:
    model = attach(tiny_model(name, seed=3))
    said = "by their place in a pass" if name == "ministral3" else "numbers the rows of a pass by itself"
    assert said in why_no_branches(model) and branches._numbers_rows(model)


def test_what_the_source_does_not_tell_a_small_tree_does(monkeypatch: pytest.MonkeyPatch) -> None:
    """Positions that count rows are noticed, and so is a sibling that is seen."""

    def by_rows(self: Any, x: mx.array, offset: Any = 0, **rest: Any) -> mx.array:
        return self.base(x, offset=offset, **rest)

    monkeypatch.setattr(PositionedRoPE, "__call__", by_rows)
    assert "a small tree gives this model other results" in why_no_branches(
        attach(tiny_model("llama", seed=3))
    )


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("scale = mx.arange(size) + offset", True),
        ("x = mx.arange(offset + 1, offset + L + 1)", True),
        ("ids = np.arange(cache[0].offset, cache[0].offset + L)", True),
        ("keys = mx.arange(kL)", False),
        ("x = self.rope(x, offset=cache.offset)", False),
    ],
)
def test_what_counts_as_numbering_rows(line: str, found: bool) -> None:
    assert bool(branches.NUMBERS_ROWS.search(line)) == found
