"""Proves that training fails cleanly: full disks, a loss that is no number, folders, settings, models of no use."""

from __future__ import annotations

import resource
import signal
from pathlib import Path

import pytest

from mtp_mlx.errors import MTPError
from mtp_mlx.train import checkpoint as checkpoints
from mtp_mlx.train.data import Example
from mtp_mlx.train.optimizer import learning_rate
from mtp_mlx.train.settings import TrainSettings
from mtp_mlx.train.trainer import Trainer
from tests.tiny import tiny_model
from tests.train.training import Remembering, examples, make_trainer, metrics, settings_for, trainer_for


def full_disk(path: Path, trainer: Trainer, most: int) -> None:
    """A checkpoint where no file may grow beyond `most` bytes, as on a disk with that much left."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, before[1]))
    try:
        trainer.save()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, ignored)


@pytest.mark.skipif(not hasattr(signal, "SIGXFSZ"), reason="file sizes cannot be limited on this system")
def test_a_full_disk_leaves_the_previous_checkpoint(tmp_path: Path) -> None:
    trainer = trainer_for(tmp_path / "adapter")
    trainer._one_step()
    trainer.save()
    before = trainer.checkpoint_path.read_bytes()
    trainer._one_step()
    with pytest.raises(MTPError, match=r"checkpoint.safetensors could not be written"):
        full_disk(tmp_path, trainer, len(before) // 2)
    assert trainer.checkpoint_path.read_bytes() == before
    assert not list(tmp_path.glob(".adapter*"))
    assert checkpoints.load_checkpoint(trainer.checkpoint_path).step == 1


def test_a_loss_that_is_no_number_stops_the_run(tmp_path: Path) -> None:
    trainer = trainer_for(tmp_path / "adapter", save_every=1, clip=0.0)
    trainer._one_step()
    trainer.save()
    trainer.adapter.slot_embeddings.weight = trainer.adapter.slot_embeddings.weight * float("nan")
    with pytest.raises(MTPError, match=r"in step 2 the loss is nan.*lower `learning_rate` \(now 0.001\)"):
        trainer.run()
    assert checkpoints.load_checkpoint(trainer.checkpoint_path).step == 1
    assert [row["step"] for row in metrics(tmp_path / "adapter")] == [1]


def test_other_peoples_folders_are_not_replaced(tmp_path: Path) -> None:
    folder, file = tmp_path / "notes", tmp_path / "file"
    folder.mkdir()
    (folder / "thesis.txt").write_text("x")
    file.write_text("x")
    with pytest.raises(MTPError, match="notes is a folder with other files"):
        trainer_for(folder)
    with pytest.raises(MTPError, match="file is a file"):
        trainer_for(file)
    empty = tmp_path / "empty"
    empty.mkdir()
    trainer = trainer_for(empty)
    (empty / "late.txt").write_text("x")  # came while the run was on
    with pytest.raises(MTPError, match="empty is a folder with other files"):
        trainer.export()
    assert (folder / "thesis.txt").exists() and (empty / "late.txt").exists()


def test_settings_that_contradict_each_other() -> None:
    cases = {
        r"`warmup` \(30\) is longer than the run \(`steps` 20\)": {"warmup": 30, "steps": 20},
        "`block_share` 0": {"block_share": 0.0},
        "`learning_rate` 0": {"learning_rate": 0.0},
        "`max_length` 8 is too short for a block of 9 slots": {"max_length": 8, "slots": 9},
        "`warmup` .*; `block_share` 0": {"warmup": 13, "block_share": 0.0},
    }
    for message, changes in cases.items():
        with pytest.raises(MTPError, match=message):
            settings_for(Path("out"), **changes)
    assert settings_for(Path("out"), warmup=12).warmup == 12


@pytest.mark.parametrize(("steps", "warmup"), [(1, 0), (20, 10), (99, 49), (100, 50), (5000, 50)])
def test_a_warm_up_that_is_not_given_fits(steps: int, warmup: int) -> None:
    settings = TrainSettings(data=Path("data"), out=Path("out"), steps=steps)
    assert settings.warmup == warmup
    assert learning_rate(settings, 0) > 0


def test_rows_too_short_for_a_slot(tmp_path: Path) -> None:
    model, listener = tiny_model("qwen3", seed=3), Remembering()
    short = Example([5, 6, 7, 8], 3)
    rows = [*examples(4), short]
    trainer = make_trainer(
        model, rows, [short], settings_for(tmp_path / "a", steps=3, batch_size=1), listener
    )
    assert listener.messages == ["1 rows left out: their responses have one token, and slots need two"]
    assert trainer.run()
    assert trainer.agreement is None
    assert any("no held-out response has 4 tokens" in message for message in listener.messages)
    trainer.attached.detach()
    with pytest.raises(MTPError, match="no training row is long enough"):
        make_trainer(model, [short], [], settings_for(tmp_path / "b"), listener)


@pytest.mark.parametrize("method", ["mask-tokens", "conf-adapt", "ptp"])
def test_rows_longer_than_a_sliding_window_are_refused_before_training(tmp_path: Path, method: str) -> None:
    overrides = {"layer_types": ["full_attention", "sliding_attention"], "sliding_window": 4}
    with pytest.raises(MTPError, match="sliding window of 4.*set `max_length` to 4"):
        trainer_for(tmp_path / "adapter", model=tiny_model("llama", **overrides), method=method)
