"""Proves that the memory of a run is estimated well, and that a machine too small for it is named."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

from mtp_mlx.drafters.slots.memory import estimate_memory
from mtp_mlx.drafters.slots.method import block_choice
from mtp_mlx.model.attach import attach
from mtp_mlx.train.data import Example
from mtp_mlx.train.memory import physical_memory, too_much
from tests.model.naive import random_adapter
from tests.tiny import VOCABULARY, tiny_model
from tests.train.training import Remembering, examples, make_trainer, settings_for


@pytest.mark.parametrize(
    "changes", [{}, {"grad_checkpoint": True}, {"loss_rows": 32, "draft_vocab": 0}], ids=str
)
def test_memory_is_estimated_within_a_factor_of_two(tmp_path: Path, changes: dict[str, Any]) -> None:
    model = tiny_model("llama", seed=3, hidden_size=96, intermediate_size=192, num_hidden_layers=6)
    rows = [Example(np.random.default_rng(0).integers(3, VOCABULARY, 90).tolist(), 4)] * 4
    settings = settings_for(tmp_path / "a", micro_batches=1, chunk_blocks=16, **changes)
    trainer = make_trainer(model, rows, [], settings, Remembering())
    estimate = trainer.method.estimate_memory(rows)
    mx.clear_cache()
    mx.reset_peak_memory()
    trainer._one_step()
    used = mx.get_peak_memory() - mx.get_active_memory() + estimate.weights + estimate.adapter
    assert 0.5 < estimate.total / used < 2, (str(estimate), used)


def test_memory_warning() -> None:
    model = tiny_model("qwen3", seed=3)
    settings = settings_for(Path("out"))
    attached = attach(model, random_adapter(model))
    estimate = estimate_memory(attached, examples(), settings, block_choice(settings))
    assert estimate.weights == sum(v.nbytes for _, v in tree_flatten(tiny_model("qwen3").parameters()))
    assert str(estimate).startswith("memory, estimated: ")
    assert too_much(estimate, ["batch_size"], machine_bytes=10**12) is None
    warning = too_much(estimate, ["batch_size", "loss_rows"], machine_bytes=10**5)
    assert warning and warning.endswith("has 0.1 MB: change one of `batch_size`, `loss_rows`")
    assert physical_memory() == os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
