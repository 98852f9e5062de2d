"""Proves that measuring costs ends in time, works for quantised models, and needs neither a long text nor a file."""

from __future__ import annotations

import logging
import time
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest

from mtp_mlx import files
from mtp_mlx.decode.layout import Layout
from mtp_mlx.decode.stats import DecodeStats
from mtp_mlx.model.attach import AttachedModel, attach
from mtp_mlx.planning import calibrate
from mtp_mlx.planning.choose import plan_drafting
from mtp_mlx.planning.tuned import TunedChoice, recall, remember
from tests.decode.fakes import attached, random_adapter
from tests.drafters.heads.test_chain import model_with_heads
from tests.model.naive import QUANTIZABLE
from tests.tiny import tiny_model


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MTP_MLX_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(files, "_warned", [])
    return tmp_path / "cache"


@pytest.fixture
def slowed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Makes every row of a pass take 0.05 s; returns a list of the rows of every pass."""
    passes: list[int] = []
    forward = AttachedModel.forward

    def slow(self: AttachedModel, block: Any, cache: Any) -> mx.array:
        passes.append(block.ids.shape[1])
        time.sleep(0.05 * block.ids.shape[1])
        return forward(self, block, cache)

    monkeypatch.setattr(AttachedModel, "forward", slow)
    return passes


def test_a_quantised_model_embeds_a_scalar_id_and_can_be_measured() -> None:
    model = tiny_model("llama", seed=3, **QUANTIZABLE)
    nn.quantize(model, group_size=32, bits=4)
    model = attach(model, random_adapter(model))
    assert mx.array_equal(model.embed(mx.array(5)), model.embed(mx.array([5]))[0])
    assert calibrate.measure(model, 60.0).surcharge


@pytest.mark.parametrize("drafter", ["slots", "heads"])
def test_measuring_ends_in_time_however_slow_a_step_is(slowed: list[int], drafter: str) -> None:
    model = attached("llama") if drafter == "slots" else model_with_heads("llama", 2, 2)
    started = time.perf_counter()
    cost = calibrate.measure(model, 1.0)
    assert time.perf_counter() - started < 2.5
    assert slowed and 768 not in slowed
    assert cost.plain[0] >= 0.05 and cost.seconds(Layout(3, (0,) * 4), 500) > 1.5 * cost.plain[0]


def test_without_time_a_plain_step_is_all_that_is_measured(slowed: list[int]) -> None:
    cost = calibrate.measure(attached("llama"), 0.0)
    assert slowed == [1, 1]  # the prompt and one step
    assert cost.rows == (1, 2) and cost.short[1] == 2 * cost.short[0] and cost.draft > 0


@pytest.mark.parametrize("known", [False, True])
def test_a_few_tokens_are_written_plainly_until_costs_are_known(
    known: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, stats = attached("llama"), DecodeStats()
    if known:
        calibrate.step_cost(model)
    monkeypatch.setattr(calibrate, "measure", lambda _: pytest.fail("measured"))
    policy = plan_drafting(model, "auto", None, stats, max_tokens=3).policy
    assert (policy.max_drafts > 0) == known
    assert [note[:5] for note in stats.fallbacks] == ([] if known else ["plain"])


def test_costs_and_tuned_layouts_need_no_folder(
    own_cache: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file stands where the folder should be: one warning, and nothing is measured twice."""
    own_cache.write_text("not a folder")
    model = attached("llama")
    with caplog.at_level(logging.WARNING, "mtp_mlx"):
        cost = calibrate.step_cost(model, lambda _: None)
        assert remember(model, TunedChoice("plain", "plain", None, None, 1.0, 1.0), {}) is None
        monkeypatch.setattr(calibrate, "measure", lambda _: pytest.fail("measured twice"))
        assert calibrate.step_cost(model) == cost and recall(model) is None
    assert len(caplog.records) == 1 and "MTP_MLX_CACHE" in caplog.text
