"""Proves which share of the positions is trained by default: as many slots a step as announced, in any number of
processes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mtp_mlx.distributed import Peers
from mtp_mlx.drafters.registry import method_class
from mtp_mlx.drafters.slots.method import SLOTS_PER_STEP, settled_share
from mtp_mlx.train.data import Example
from mtp_mlx.train.trainer import Trainer
from tests.tiny import VOCABULARY, tiny_model
from tests.train.training import Remembering, settings_for

ROWS = [Example(np.random.default_rng(n).integers(3, VOCABULARY, 700).tolist(), 4) for n in range(4)]


def share(out: Path, size: int, micro_batches: int, **changes: Any) -> float | None:
    """Of one of `size` processes."""
    settings = settings_for(
        out, block_share=None, micro_batches=micro_batches, max_length=1024, memory="10GB", **changes
    )
    kind = method_class("mask-tokens")
    peers = Peers(0, size)
    trainer = Trainer(kind, tiny_model("llama", seed=3), ROWS, [], settings, Remembering(), peers)
    assert trainer.settings.micro_batches == micro_batches
    return trainer.settings.block_share  # type: ignore[attr-defined]


def test_two_processes_train_the_positions_of_one(tmp_path: Path) -> None:
    alone, two = share(tmp_path / "a", 1, 4), share(tmp_path / "b", 2, 2)
    assert alone == two and alone is not None and 0 < alone < 1
    slots = alone * settings_for(tmp_path).slots * 4 * settings_for(tmp_path).batch_size * 696  # type: ignore[attr-defined]
    assert slots == pytest.approx(SLOTS_PER_STEP, rel=0.01)


def test_a_tiny_share_is_not_none(tmp_path: Path) -> None:
    settings = settings_for(
        tmp_path / "a", block_share=None, batch_size=64, micro_batches=640, max_length=1024
    )
    settled = settled_share(settings, ROWS)  # type: ignore[type-var]
    assert 0 < settled.block_share < 0.001  # type: ignore[attr-defined, operator]


def test_a_share_that_is_given_stays(tmp_path: Path) -> None:
    settings = settings_for(tmp_path / "a", block_share=0.9)
    assert settled_share(settings, ROWS) is settings  # type: ignore[type-var]
