"""Proves that measuring costs ends in time or at Ctrl-C, is gone on with later, and needs neither text nor file."""

from __future__ import annotations

import logging
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest

from mtp_mlx import files
from mtp_mlx.decode.layout import Layout
from mtp_mlx.decode.stats import DecodeStats
from mtp_mlx.model.attach import AttachedModel, attach
from mtp_mlx.planning import calibrate, timing
from mtp_mlx.planning.choose import plan_drafting
from mtp_mlx.planning.tuned import TunedChoice, recall, remember
from tests.decode.fakes import attached, random_adapter
from tests.drafters.heads.test_chain import model_with_heads
from tests.model.naive import QUANTIZABLE
from tests.tiny import save_tiny, tiny_model


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MTP_MLX_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(files, "_warned", {})
    return tmp_path / "cache"


@dataclass
class Slowed:
    """Rows of every pass, each of which took so many `seconds` a row by this clock."""

    passes: list[int] = field(default_factory=list)
    seconds: float = 0.05

    @property
    def clock(self) -> float:
        return self.seconds * sum(self.passes)

    def perf_counter(self) -> float:
        return self.clock


@pytest.fixture
def slowed(monkeypatch: pytest.MonkeyPatch) -> Slowed:
    """Makes every row of a pass take 0.05 s by the clock of `timing`."""
    slow, forward = Slowed(), AttachedModel.forward

    def counted(self: AttachedModel, block: Any, cache: Any) -> mx.array:
        slow.passes.append(block.ids.shape[1])
        return forward(self, block, cache)

    monkeypatch.setattr(AttachedModel, "forward", counted)
    monkeypatch.setattr(timing, "time", slow)
    return slow


def test_a_quantised_model_embeds_a_scalar_id_and_can_be_measured() -> None:
    model = tiny_model("llama", seed=3, **QUANTIZABLE)
    nn.quantize(model, group_size=32, bits=4)
    model = attach(model, random_adapter(model))
    assert mx.array_equal(model.embed(mx.array(5)), model.embed(mx.array([5]))[0])
    assert calibrate.measure(model, 60.0).surcharge


@pytest.mark.parametrize("drafter", ["slots", "heads"])
def test_measuring_ends_in_time_however_slow_a_step_is(slowed: Slowed, drafter: str) -> None:
    model = attached("llama") if drafter == "slots" else model_with_heads("llama", 2, 2)
    cost = calibrate.measure(model, 1.0)
    assert 0.5 < slowed.clock <= 1.05 and 768 not in slowed.passes
    assert cost.plain[0] > 0.049 and cost.seconds(Layout(3, (0,) * 4), 500) > 1.5 * cost.plain[0]


def test_without_time_a_plain_step_is_all_that_is_measured(slowed: Slowed) -> None:
    cost = calibrate.measure(attached("llama"), 0.0)
    assert slowed.passes == [1, 1]  # the prompt and one step
    assert cost.rows == (1,) and cost.plain == () and cost.draft is None


def in_another_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """What this process remembers is forgotten, so that only files are left."""
    monkeypatch.setattr(calibrate, "_measured", {})
    monkeypatch.setattr(calibrate, "_gone_on", set())
    monkeypatch.setattr(calibrate, "_saved_up", set())


@pytest.mark.parametrize("tokens", [400, 1000, 100_000])
@pytest.mark.parametrize("drafter", ["slots", "heads"])
def test_later_runs_go_on_with_what_was_cut_short(
    slowed: Slowed, drafter: str, tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With 2 % of their time, saved up if need be, at most 3 s at once, and timing only a step of one row again."""
    model = attached("llama") if drafter == "slots" else model_with_heads("llama", 2, 2)
    monkeypatch.setattr(timing, "LONG_CONTEXTS", (20,))
    monkeypatch.setattr(timing, "REAL_ROWS", (1, 4, 16, 2))
    monkeypatch.setattr(timing, "SLOT_ROWS", (4, 20, 1))
    monkeypatch.setattr(calibrate, "BUDGET", 0.9)
    assert calibrate.prepare_costs(model, tokens, lambda _: None)
    first = before = calibrate.step_cost(model)
    assert len(first.rows) < 4 and not first.long
    monkeypatch.setattr(calibrate, "BUDGET", 3.0)
    spent, share = 0.0, 0.02 * tokens * first.plain_seconds
    for runs in range(1, 200):
        in_another_process(monkeypatch)
        slowed.passes.clear()
        assert calibrate.prepare_costs(model, 16) and not slowed.passes, "not for a few tokens"
        for _ in range(2):  # the command line asks, and then the library
            assert calibrate.prepare_costs(model, tokens)
        spent += slowed.clock
        assert slowed.clock <= 3.05 and spent <= runs * (share + 0.02) + 0.05
        cost = calibrate.step_cost(model)
        known = dict(zip(cost.rows, cost.short, strict=True))
        assert [known[rows] for rows in before.rows] == pytest.approx(before.short)
        before = cost
        if timing.seconds_to_go_on(model, cost) is None:
            break
    assert cost.long and len(cost.rows) == 4 and cost.draft is not None
    assert len(cost.slot_rows) == (3 if drafter == "slots" else 0)
    slowed.passes.clear()
    in_another_process(monkeypatch)
    assert calibrate.prepare_costs(model, 100_000) and not slowed.passes, "nothing is missing"


def test_what_is_known_is_brought_to_the_pace_of_now(slowed: Slowed, monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that was busy when half of it was measured."""
    model = attached("llama")
    monkeypatch.setattr(timing, "LONG_CONTEXTS", (40,))
    all_at_once = calibrate.measure(model, 60.0)
    slowed.seconds = 0.15
    busy = calibrate.measure(model, 3.0)
    assert 1 < len(busy.rows) < len(all_at_once.rows)
    slowed.seconds, slowed.passes[:] = 0.05, []
    cost = calibrate.measure(model, 60.0, busy)
    assert slowed.passes[:2] == [1, 1], "the prompt, and a step of one row"
    for found, wanted in zip(
        (cost.rows, cost.short, cost.long, cost.slot_rows, cost.plain),
        (all_at_once.rows, all_at_once.short, all_at_once.long, all_at_once.slot_rows, all_at_once.plain),
        strict=True,
    ):
        assert found == pytest.approx(wanted, rel=0.01)


SLOW = """
import sys, time
from mtp_mlx.cli import main
from mtp_mlx.model.attach import AttachedModel
from mtp_mlx.planning import calibrate

calibrate.BUDGET = 60.0
forward = AttachedModel.forward

def slow(self, block, cache):
    time.sleep(0.05 * block.ids.shape[1])
    return forward(self, block, cache)

AttachedModel.forward = slow
main(sys.argv[1:])
"""


@pytest.mark.parametrize("verb", ["generate", "serve"])
def test_ctrl_c_ends_measuring_at_once(verb: str, own_cache: Path) -> None:
    save_tiny(own_cache.parent / "model", "llama", seed=3)
    options = [
        "-m",
        str(own_cache.parent / "model"),
        "-a",
        "none",
        *(["--port", "0"] if verb == "serve" else []),
    ]
    options += ["-p", "the"] if verb == "generate" else []
    process = subprocess.Popen(
        [sys.executable, "-c", SLOW, verb, *options],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        # A suite that a shell started in the background ignores Ctrl-C, and what it starts would, too.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    try:
        assert process.stderr is not None
        for line in process.stderr:
            if "measuring what a step costs" in line:
                break
        time.sleep(0.3)
        pressed = time.monotonic()
        process.send_signal(signal.SIGINT)
        _, rest = process.communicate(timeout=60)
        assert process.returncode == 130 and "Stopped." in rest and "Traceback" not in rest
        assert time.monotonic() - pressed < 20, "the measurement takes 60 s"
    finally:
        process.kill()
    assert not (own_cache / "costs").exists()


@pytest.mark.parametrize("known", [False, True])
def test_a_few_tokens_are_written_plainly_until_costs_are_known(
    known: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, stats = attached("llama"), DecodeStats()
    if known:
        calibrate.step_cost(model)
    monkeypatch.setattr(calibrate, "measure", lambda *_: pytest.fail("measured"))
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
        monkeypatch.setattr(calibrate, "measure", lambda *_: pytest.fail("measured twice"))
        assert calibrate.step_cost(model) == cost and recall(model) is None
    assert [record.message[:13] for record in caplog.records] == ["step costs ar", "tuned layouts"]
    assert caplog.text.count("MTP_MLX_CACHE") == 1


@pytest.mark.parametrize("drafter", ["slots", "heads"])
def test_a_long_context_is_as_long_as_there_is_time_for(
    slowed: Slowed, drafter: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A prompt of 80 tokens would take longer than everything may: without a shorter one, contexts cost nothing."""
    monkeypatch.setattr(timing, "LONG_CONTEXTS", (80, 20))
    model = attached("llama") if drafter == "slots" else model_with_heads("llama", 2, 2)
    cost = calibrate.measure(model, 8.0)
    assert cost.contexts[1] == 20 and cost.long and 80 not in slowed.passes
    again = calibrate.measure(model, 8.0, cost)
    assert again.contexts == cost.contexts
    assert calibrate.measure(model, 100.0).contexts[1] == 80
