"""Proves that the memory of a run is estimated well, that steps fit the memory given, and that what cannot fit is
refused."""

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
from mtp_mlx.errors import MTPError
from mtp_mlx.model.attach import attach
from mtp_mlx.train.data import Example
from mtp_mlx.train.memory import (
    MemoryBudget,
    container_limit,
    machine_memory,
    memory_budget,
    parsed_size,
    physical_memory,
)
from mtp_mlx.train.plan import WHOLE, StepPlan, fastest_that_fits
from tests.model.naive import random_adapter
from tests.tiny import VOCABULARY, tiny_model
from tests.train.training import Remembering, examples, make_trainer, settings_for

# Large states, as in released models.
STATES: dict[str, dict[str, Any]] = {
    "qwen3_next": {"linear_key_head_dim": 32, "linear_value_head_dim": 32, "num_hidden_layers": 4},
    "nemotron_h": {"mamba_head_dim": 48, "ssm_state_size": 64, "num_hidden_layers": 4},
}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"grad_checkpoint": True},
        {"architecture": "qwen3_next"},
        {"architecture": "qwen3_next", "grad_checkpoint": True},
        {"architecture": "nemotron_h"},
        {"loss_rows": 32, "draft_vocab": 0},
        {"method": "conf-adapt", "slots": 7, "region_rows": 16},
        {"method": "conf-adapt", "slots": 7, "region_rows": 16, "tuning": "lora", "draft_vocab": 0},
        {"method": "conf-adapt", "slots": 7, "region_rows": 16, "tuning": "full", "draft_vocab": 0},
    ],
    ids=str,
)
def test_memory_is_estimated_within_a_factor_of_two(tmp_path: Path, changes: dict[str, Any]) -> None:
    sizes = {"hidden_size": 96, "intermediate_size": 192, "num_hidden_layers": 6}
    changes, architecture = dict(changes), changes.get("architecture", "llama")
    model = tiny_model(
        changes.pop("architecture", "llama"), seed=3, **{**sizes, **STATES.get(architecture, {})}
    )
    rows = [Example(np.random.default_rng(0).integers(3, VOCABULARY, 90).tolist(), 4)] * 4
    settings = settings_for(tmp_path / "a", micro_batches=1, chunk_blocks=16, **changes)
    trainer = make_trainer(model, rows, [], settings, Remembering())
    estimate = trainer.estimate
    mx.clear_cache()
    mx.reset_peak_memory()
    trainer._one_step()
    used = mx.get_peak_memory() - mx.get_active_memory() + estimate.weights + estimate.adapter
    assert 0.5 < (estimate.total - estimate.process) / used < 2, (str(estimate), used)


def test_the_parts_of_an_estimate() -> None:
    model = tiny_model("qwen3", seed=3)
    settings = settings_for(Path("out"))
    attached = attach(model, random_adapter(model))
    estimate = estimate_memory(attached, examples(), settings, block_choice(settings), WHOLE)
    assert estimate.weights == sum(v.nbytes for _, v in tree_flatten(tiny_model("qwen3").parameters()))
    assert str(estimate).startswith("memory, estimated: ")


def test_the_largest_slices_that_fit_are_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Less memory: smaller slices, then one thread, then gradient checkpointing; then a refusal."""
    monkeypatch.setattr("mtp_mlx.drafters.slots.memory.beside", lambda weights: 10**6)
    model = tiny_model("llama", seed=3, hidden_size=96, intermediate_size=192, num_hidden_layers=6)
    rows = [Example(np.random.default_rng(0).integers(3, VOCABULARY, 400).tolist(), 4)] * 4
    settings = settings_for(tmp_path / "a", max_length=512)
    method = make_trainer(model, rows, [], settings, Remembering()).method
    plans = list(method.plans())
    needs = [method.estimate_memory(rows, plan).total for plan in plans]
    assert plans[0] == StepPlan(256, 2, False) and plans[-1].grad_checkpoint and plans[-1].workers == 1
    for budget in (max(needs), sorted(needs)[len(needs) // 2], min(needs)):
        chosen = fastest_that_fits(iter(plans), lambda plan: method.estimate_memory(rows, plan), of(budget))
        assert chosen == next(plan for plan, need in zip(plans, needs, strict=True) if need <= budget)
    with pytest.raises(MTPError, match="even in the smallest slices, and `memory` allows"):
        fastest_that_fits(iter(plans), lambda plan: method.estimate_memory(rows, plan), of(min(needs) // 2))


def of(size: int) -> MemoryBudget:
    return MemoryBudget(size, "`memory` allows")


def test_sizes_and_budgets(monkeypatch: pytest.MonkeyPatch) -> None:
    assert [parsed_size(text) for text in ("2GB", "1.5g", "800 MB", "3GiB", "12b")] == [
        2_000_000_000, 1_500_000_000, 800_000_000, 3_000_000_000, 12
    ]  # fmt: skip
    for wrong in ("", "much", "-2GB", "0", "2 PB", "GB", "12"):
        with pytest.raises(MTPError, match="`memory` must be a size such as 12GB"):
            parsed_size(wrong)
    assert physical_memory() == os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    monkeypatch.setattr("mtp_mlx.train.memory.container_limit", lambda: 4 * 10**9)
    assert machine_memory() == min(physical_memory(), 4 * 10**9)
    assert memory_budget(None).bytes == int(0.6 * machine_memory())
    assert memory_budget("1GB").bytes == 10**9
    with pytest.raises(MTPError, match="the machine has 4.0 GB: give less"):
        memory_budget("5GB")


@pytest.mark.parametrize(
    ("groups", "files", "limit"),
    [
        ("0::/jobs/one\n", {"jobs/memory.max": "5000000", "jobs/one/memory.max": "max"}, 5_000_000),
        ("0::/of/the/host\n", {"memory.max": "7000000"}, 7_000_000),
        (
            "4:cpu:/a\n5:memory:/a\n",
            {"memory/a/memory.limit_in_bytes": "6000000", "memory/memory.limit_in_bytes": str(2**63 - 4096)},
            6_000_000,
        ),
        ("0::/\n", {}, 0),
    ],
    ids=["version 2, nested", "version 2, in a container", "version 1", "none"],
)
def test_the_limit_of_a_container(tmp_path: Path, groups: str, files: dict[str, str], limit: int) -> None:
    (tmp_path / "own").write_text(groups)
    for name, content in files.items():
        path = tmp_path / "cgroup" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content + "\n")
    assert container_limit(tmp_path / "cgroup", tmp_path / "own") == limit
    assert container_limit(tmp_path / "cgroup", tmp_path / "no such file") == 0
