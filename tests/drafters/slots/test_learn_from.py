"""Proves that slots learn from prompts as if these were responses, and that held-out measurements do not."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mtp_mlx.errors import MTPError
from mtp_mlx.train.data import Example
from mtp_mlx.train.trainer import Trainer
from tests.tiny import tiny_model
from tests.train.training import Remembering, examples, make_trainer, settings_for

METHODS = ["mask-tokens", "ptp", "conf-adapt"]
ROWS = [Example([2, *example.tokens], example.loss_start + 1) for example in examples()]  # 2: in prompts only


def trainer_on(out: Path, rows: list[Example], method: str, **changes: Any) -> tuple[Trainer, Remembering]:
    listener = Remembering()
    changes = {"steps": 1, "warmup": 0, "draft_vocab": 0, **changes}
    settings = settings_for(out, method=method, **changes)
    return make_trainer(tiny_model("qwen3", seed=3), rows, ROWS[:3], settings, listener), listener


def first_step(out: Path, rows: list[Example], method: str, **changes: Any) -> tuple[float, int]:
    """(loss, supervised rows) of the first step."""
    trainer, listener = trainer_on(out, rows, method, **changes)
    assert trainer.run()
    return listener.steps[0].loss, listener.steps[0].rows


@pytest.mark.parametrize(
    ("method", "changes"),
    [
        ("mask-tokens", {}),
        ("mask-tokens", {"objective": "apple"}),
        ("mask-tokens", {"block_lengths": "random", "block_share": 0.7}),
        ("ptp", {}),
        ("conf-adapt", {"region_rows": 6}),
    ],
)
def test_prompts_are_learnt_from_as_responses_are(
    tmp_path: Path, method: str, changes: dict[str, Any]
) -> None:
    whole = [replace(row, loss_start=0) for row in ROWS]
    everything = first_step(tmp_path / "all", ROWS, method, learn_from="all", **changes)
    assert everything == first_step(tmp_path / "whole", whole, method, **changes)
    assert everything[1] > first_step(tmp_path / "responses", ROWS, method, **changes)[1]


@pytest.mark.parametrize("method", METHODS)
def test_the_draft_vocabulary_counts_what_is_learnt_from(tmp_path: Path, method: str) -> None:
    def drafted(**changes: Any) -> list[int]:
        trainer, _ = trainer_on(tmp_path / "a", ROWS, method, draft_vocab=9, **changes)
        ids = trainer.attached.draft_ids
        assert ids is not None
        return ids.tolist()

    assert 2 in drafted(learn_from="all") and 2 not in drafted()


@pytest.mark.parametrize("method", METHODS)
def test_measurements_stay_on_responses(tmp_path: Path, method: str) -> None:
    every, _ = trainer_on(tmp_path / "a", ROWS, method, learn_from="all")
    responses, _ = trainer_on(tmp_path / "b", ROWS, method)
    batches = [ROWS[:3], ROWS[3:8]]
    assert every.method.measure(batches) == responses.method.measure(batches)
    whole = [[replace(row, loss_start=0) for row in batch] for batch in batches]
    assert every.method.measure(whole).blocks > every.method.measure(batches).blocks


def test_rows_whose_response_is_too_short_teach_by_their_prompt(tmp_path: Path) -> None:
    rows = [Example(row.tokens, len(row.tokens) - 1) for row in ROWS]
    assert first_step(tmp_path / "all", rows, "mask-tokens", learn_from="all")[1] > 0
    with pytest.raises(MTPError, match="responses of two tokens"):
        trainer_on(tmp_path / "b", rows, "mask-tokens")
    with pytest.raises(MTPError, match="rows of three tokens"):
        trainer_on(tmp_path / "c", [Example([3, 4], 1)], "mask-tokens", learn_from="all")
