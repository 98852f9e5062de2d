"""Proves that runs resume to the same bits after kills and interrupts, and start from what fits only."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mtp_mlx.adapter_folder import read_header
from mtp_mlx.drafters.registry import training_methods
from mtp_mlx.errors import MTPError
from mtp_mlx.train import checkpoint as checkpoints
from mtp_mlx.train.trainer import Trainer
from tests.tiny import tiny_model
from tests.train.training import (
    Remembering,
    examples,
    make_trainer,
    metrics,
    same,
    settings_for,
    trainer_for,
    weights,
)

ROOT = Path(__file__).parents[2]

METHODS = ["mask-tokens", "mtp-heads"]
Run = tuple[Path, Trainer, Remembering]


def whole_run(folder: Path, method: str) -> Run:
    """A finished run of twelve steps."""
    out = folder / "adapter"
    listener = Remembering()
    trainer = trainer_for(out, listener, method=method)
    assert not trainer.resume()
    assert trainer.run()
    return out, trainer, listener


@pytest.fixture(scope="module")
def whole_runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Run]:
    """A finished run of every method."""
    return {method: whole_run(tmp_path_factory.mktemp(method), method) for method in METHODS}


@pytest.fixture(scope="module")
def uninterrupted(whole_runs: dict[str, Run]) -> Run:
    """That of mask tokens."""
    return whole_runs["mask-tokens"]


def child(out: Path, pause: float = 0.0, method: str = "mask-tokens") -> subprocess.Popen:
    command = [sys.executable, "-m", "tests.train.training", str(out), str(pause), method]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_for(process: subprocess.Popen, line: str) -> None:
    assert process.stdout is not None
    for printed in process.stdout:
        if printed.strip() == line:
            return
    raise AssertionError(f"{line!r} never came: {process.stderr.read() if process.stderr else ''}")


def finish(out: Path, method: str = "mask-tokens") -> Trainer:
    """Resumes and runs to the end, in this process."""
    trainer = trainer_for(out, method=method)
    trainer.resume()
    assert trainer.run()
    return trainer


def check_same_run(out: Path, trainer: Trainer, uninterrupted: Run) -> None:
    whole_out, whole, _ = uninterrupted
    assert metrics(out) == metrics(whole_out)  # every loss, norm and acceptance, no line twice
    assert same(weights(trainer), weights(whole))
    for name in ("mtp.safetensors", "mtp_config.json"):
        assert (out / name).read_bytes() == (whole_out / name).read_bytes()


@pytest.mark.parametrize(
    ("method", "line", "delay"),
    [
        ("mask-tokens", "step 2", 0.0),
        ("mask-tokens", "step 5", 0.02),
        ("mask-tokens", "step 9", 0.001),
        ("mask-tokens", "step 12", 0.01),
        ("mtp-heads", "step 2", 0.0),
        ("mtp-heads", "step 5", 0.02),
        ("mtp-heads", "step 9", 0.001),
    ],
)
def test_a_killed_run_goes_on_to_the_same_bits(
    tmp_path: Path, whole_runs: dict[str, Run], method: str, line: str, delay: float
) -> None:
    """SIGKILL before the first checkpoint, between two, around writing one, and after the last step."""
    out = tmp_path / "adapter"
    process = child(out, method=method)
    wait_for(process, line)
    time.sleep(delay)
    process.kill()
    process.wait()
    check_same_run(out, finish(out, method), whole_runs[method])
    assert sorted(path.name for path in tmp_path.iterdir() if path.suffix == ".safetensors") == [
        "adapter.checkpoint.safetensors"
    ]


@pytest.mark.parametrize(
    ("method", "number"),
    [(METHODS[0], signal.SIGINT), (METHODS[0], signal.SIGTERM), (METHODS[1], signal.SIGINT)],
)
def test_an_interrupted_run_saves_and_goes_on(
    tmp_path: Path, whole_runs: dict[str, Run], method: str, number: signal.Signals
) -> None:
    out = tmp_path / "adapter"
    process = child(out, pause=0.3, method=method)
    wait_for(process, "step 4")
    process.send_signal(number)
    printed, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert "stopped after step" in printed and "Traceback" not in errors
    state = checkpoints.load_checkpoint(out.with_name("adapter.checkpoint.safetensors"))
    assert state.step in (4, 5)
    assert read_header(out).training["steps"] == state.step
    check_same_run(out, finish(out, method), whole_runs[method])


def test_a_second_interrupt_stops_without_saving(tmp_path: Path) -> None:
    process = child(tmp_path / "adapter", pause=1.5)
    wait_for(process, "step 1")
    process.send_signal(signal.SIGINT)
    time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode != 0 and "KeyboardInterrupt" in errors
    assert not list(tmp_path.glob("*.safetensors"))


@pytest.mark.parametrize("method", METHODS)
def test_metrics_cut_in_a_line_go_on(tmp_path: Path, whole_runs: dict[str, Run], method: str) -> None:
    """Killed while writing a line, after the checkpoint of step 3: later steps and the stump are dropped."""
    out = tmp_path / "adapter"
    trainer = trainer_for(out, method=method)
    for _ in range(3):
        trainer._one_step()
    trainer.save()
    trainer._one_step()
    with open(trainer.metrics_path, "a") as file:
        file.write('{"step": 5, "lo')
    (tmp_path / f".adapter.checkpoint.{2**22 + 5}.safetensors").write_text("half a checkpoint")
    check_same_run(out, finish(out, method), whole_runs[method])
    assert not list(tmp_path.glob(".adapter.checkpoint.*"))


def test_a_finished_run_has_nothing_to_do(tmp_path: Path) -> None:
    out = tmp_path / "adapter"
    listener = Remembering()
    assert trainer_for(out, steps=3, held_out=0).run()
    before = metrics(out)
    trainer = trainer_for(out, listener, steps=3, held_out=0)
    assert trainer.resume() and trainer.run()
    assert listener.steps == [] and listener.measured == [] and metrics(out) == before
    assert trainer.agreement is not None and trainer.loss == before[2]["loss"]


def test_a_checkpoint_of_another_run_is_refused(tmp_path: Path) -> None:
    out = tmp_path / "adapter"
    trainer_for(out).save()
    rows = examples()
    cases: list[tuple[str, Any]] = [
        (
            "learning_rate was 0.001, now 0.01; rank was 4, now 5",
            trainer_for(out, rank=5, learning_rate=0.01),
        ),
        (
            "the training data changed",
            make_trainer(tiny_model("qwen3", seed=3), rows[:9], rows[10:], settings_for(out), Remembering()),
        ),
        (r"the base model was \w{16}, now \w{16}", trainer_for(out, model=tiny_model("qwen3", seed=4))),
    ]
    for message, trainer in cases:
        with pytest.raises(MTPError, match=message):
            trainer.resume()
    assert trainer_for(out, save_every=7, measure_every=5, grad_checkpoint=True).resume()  # these may change


# Settings as checkpoints of 2026-11 hold them, when one dataclass had the settings of all methods.
OLD_SHARED = {
    "draft_vocab": 60, "steps": 12, "batch_size": 2, "micro_batches": 2, "max_length": 1024, "cut_at_tokens": 0,
    "learning_rate": 0.001, "start_from": None, "warmup": 3, "schedule": "cosine", "final_rate": 0.05,
    "weight_decay": 0.0, "clip": 1.0, "loss_rows": 2048, "held_out": None, "seed": 0,
}  # fmt: skip
OLD_SLOTS = {"slots": 3, "rank": 4, "alpha": 8.0, "target_modules": [], "chunk_blocks": 4}
OLD_BLOCKS = {"block_share": 1.0, "max_blocks": 0, "depth_decay": 1.0}
OLD_OWN: dict[str, dict[str, Any]] = {
    "mask-tokens": {
        **OLD_SLOTS, **OLD_BLOCKS,
        "objective": "self-distill", "sampler_width": 16, "lcm_weight": 1.0, "sampler_rate": 0.3,
    },
    "mtp-heads": {
        "heads": 3, "extend": None, "ce_weight": 1.0, "kl_weight": 1.0, "top_share": 0.2, "temperature": 1.0,
        "learn_prompts": False, "block_share": 1.0, "depth_decay": 1.0, "loss_rows": 32,
    },
    "conf-adapt": {
        **OLD_SLOTS, "chunk_blocks": 16,
        "tuning": "gated-lora", "supervision": "hard-teacher", "region_rows": 32,
    },
    "ptp": {
        **OLD_SLOTS, **OLD_BLOCKS,
        "variant": "o", "u_embedding": "bits", "u_beta": 0.3, "uniforms": "teacher", "independent": False,
        "ptp_loss": "ce", "greedy_share": 0.0, "teacher_temperature": 1.0, "teacher_top_k": 0,
        "teacher_top_p": 1.0, "teacher_min_p": 0.0,
    },
}  # fmt: skip


OTHER_DEFAULT_THEN: dict[str, dict[str, Any]] = {"conf-adapt": {"region_rows": 32}}


@pytest.mark.parametrize("method", training_methods())
def test_a_checkpoint_from_before_methods_had_settings_of_their_own(tmp_path: Path, method: str) -> None:
    """It resumes, and what was written then is written today; what is newer is at its default."""
    old = {"method": method, **OLD_SHARED, **OLD_OWN[method]}
    given = {"method": method, **OTHER_DEFAULT_THEN.get(method, {})}
    trainer = trainer_for(tmp_path / "adapter", **given)
    now = checkpoints.comparable(trainer.settings)
    if method == "mask-tokens":  # recorded then beside self-distillation, which did not read it
        assert (old["lcm_weight"], now.pop("lcm_weight")) == (1.0, 0.0)
    assert {name: old[name] for name in now if name in old} == {
        name: now[name] for name in now if name in old
    }
    assert old.keys() - now.keys() <= {"lcm_weight"}
    trainer.save()
    tensors, metadata = mx.load(str(trainer.checkpoint_path), return_metadata=True)
    mx.save_safetensors(str(trainer.checkpoint_path), tensors, {**metadata, "settings": json.dumps(old)})
    assert trainer_for(tmp_path / "adapter", **given).resume()
    with pytest.raises(MTPError, match="clip was 1.0, now 2.0. Use"):
        trainer_for(tmp_path / "adapter", **given, clip=2.0).resume()


def test_a_checkpoint_older_than_a_setting(tmp_path: Path) -> None:
    """A setting that the checkpoint does not know and that is at its default now did not change."""
    out = tmp_path / "adapter"
    trainer = trainer_for(out)
    trainer._one_step()
    trainer.save()
    tensors, metadata = mx.load(str(trainer.checkpoint_path), return_metadata=True)
    settings = json.loads(metadata["settings"])
    assert settings.pop("method") == "mask-tokens" and settings.pop("weight_decay") == 0.0
    mx.save_safetensors(str(trainer.checkpoint_path), tensors, {**metadata, "settings": json.dumps(settings)})
    assert trainer_for(out).resume()
    with pytest.raises(MTPError, match=r"weight_decay was None, now 0.1. Use"):
        trainer_for(out, weight_decay=0.1).resume()


@pytest.mark.parametrize("kept", [0, 40, 3000, -100])
def test_a_damaged_checkpoint_is_refused(tmp_path: Path, kept: int) -> None:
    out = tmp_path / "adapter"
    trainer = trainer_for(out)
    trainer.save()
    content = trainer.checkpoint_path.read_bytes()
    trainer.checkpoint_path.write_bytes(content[:kept])
    with pytest.raises(MTPError, match="is damaged.*delete it to start again"):
        trainer_for(out).resume()


def test_starting_from_another_adapter(tmp_path: Path, uninterrupted: Run) -> None:
    whole_out, whole, _ = uninterrupted
    trainer = trainer_for(tmp_path / "a", start_from=whole_out, steps=3)
    for name, value in weights(trainer).items():
        np.testing.assert_allclose(value, weights(whole)[name], rtol=0.01, atol=1e-6)  # stored in bfloat16
    assert trainer.run()
    assert read_header(tmp_path / "a").training["start_from"] == "adapter"
    listener = Remembering()
    other = trainer_for(tmp_path / "c", listener, start_from=whole_out, draft_vocab=61)
    assert "another draft vocabulary" in str(listener.messages), "told, since it changes what is drafted"
    for name, value in weights(other).items():
        if name != "draft_ids":
            np.testing.assert_allclose(value, weights(whole)[name], rtol=0.01, atol=1e-6)
    cases: dict[str, dict[str, Any]] = {
        "this model.s fingerprint is": {"model": tiny_model("qwen3", seed=4)},
        "trained with rank 4, these settings say 5": {"rank": 5},
        "trained with alpha 8.0, these settings say 64.0": {"alpha": 64.0},
    }
    for message, changes in cases.items():
        with pytest.raises(MTPError, match=message):
            trainer_for(tmp_path / "b", start_from=whole_out, **changes)
