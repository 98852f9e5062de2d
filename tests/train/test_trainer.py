"""Proves that training learns and leaves the base alone, at the learning rate and with the draft ids asked for."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

from mtp_mlx.drafters.registry import load_folder
from mtp_mlx.train.data import Example
from mtp_mlx.train.draft_vocabulary import draft_vocabulary
from mtp_mlx.train.optimizer import learning_rate
from tests.model.naive import quantized_model
from tests.tiny import VOCABULARY, tiny_model
from tests.train.training import Remembering, same, settings_for, trainer_for, weights


@pytest.mark.parametrize("objective", ["self-distill", "apple"])
def test_the_loss_goes_down(tmp_path: Path, objective: str) -> None:
    listener = Remembering()
    trainer = trainer_for(
        tmp_path / "adapter", listener, objective=objective, steps=40, measure_every=0, learning_rate=5e-3
    )
    assert trainer.run()
    losses = [report.loss for report in listener.steps]
    assert np.mean(losses[-5:]) < 0.75 * np.mean(losses[:5]), losses
    assert listener.measured == [40]


@pytest.mark.parametrize("quantized", [False, True])
def test_the_base_stays_as_it_was(tmp_path: Path, quantized: bool) -> None:
    """Weights bit for bit, and the real rows' logits with the trained adapter on."""

    def build() -> Any:
        return quantized_model("qwen3") if quantized else tiny_model("qwen3", seed=3)

    model = build()
    before = {name: np.array(value) for name, value in tree_flatten(model.parameters())}
    tokens = mx.array([[5, 9, 31, 77, 140]])
    trainer = trainer_for(tmp_path / "adapter", model=model, steps=4)
    start = weights(trainer)
    assert trainer.run()
    after = weights(trainer)
    assert not [name for name in start if name != "draft_ids" and np.array_equal(start[name], after[name])]
    assert mx.array_equal(model(tokens), build()(tokens))
    trainer.attached.detach()
    assert same({name: np.array(value) for name, value in tree_flatten(model.parameters())}, before)
    adapter, info = load_folder(tmp_path / "adapter", build())
    assert info.training["steps"] == 4 and info.acceptance
    for name, value in adapter.tensors().items():
        np.testing.assert_allclose(np.array(value), after[name], rtol=0.01, atol=1e-6)  # bfloat16


def test_learning_rate_schedules() -> None:
    base = settings_for(Path("out"), steps=20, warmup=4, learning_rate=2.0, final_rate=0.1)

    def rates(schedule: str) -> list[float]:
        chosen = dataclasses.replace(base, schedule=schedule)
        return [learning_rate(chosen, step) for step in range(21)]

    for schedule in ("constant", "cosine", "linear"):
        assert rates(schedule)[:5] == pytest.approx([0.5, 1.0, 1.5, 2.0, 2.0])
    assert rates("constant")[4:] == [2.0] * 17
    assert rates("linear")[12] == pytest.approx(1.1) and rates("linear")[20] == pytest.approx(0.2)
    assert rates("cosine")[12] == pytest.approx(1.1) and rates("cosine")[20] == pytest.approx(0.2)
    assert rates("cosine")[8] == pytest.approx(0.2 + 1.8 * (1 + np.cos(np.pi / 4)) / 2)
    assert learning_rate(dataclasses.replace(base, warmup=0), 0) == 2.0


def test_draft_vocabulary_is_what_responses_use_most() -> None:
    rows = [Example([50, 50, 50, 7, 9, 9], 3), Example([8, 9, 7, 60], 1)]
    assert draft_vocabulary(rows, 2, VOCABULARY).tolist() == [7, 9]
    assert draft_vocabulary(rows, 6, VOCABULARY).tolist() == [0, 1, 2, 7, 9, 60]  # filled up from the low ids
    assert draft_vocabulary(rows, 0, VOCABULARY) is draft_vocabulary(rows, 157, VOCABULARY) is None
