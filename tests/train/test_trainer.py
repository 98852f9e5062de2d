"""Proves that training learns, leaves the base alone, resumes to the same bits after kills, fails cleanly."""

from __future__ import annotations

import ctypes
import dataclasses
import json
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

from mtp_mlx.adapter import load_adapter, read_config, read_info
from mtp_mlx.blas import LIBRARY, blas_threads
from mtp_mlx.errors import MTPError
from mtp_mlx.model.attach import attach
from mtp_mlx.train import checkpoint as checkpoints
from mtp_mlx.train.data import Example
from mtp_mlx.train.draft_vocabulary import draft_vocabulary
from mtp_mlx.train.memory import estimate_memory, physical_memory, too_much
from mtp_mlx.train.objectives.self_distil import SelfDistil
from mtp_mlx.train.settings import TrainSettings
from mtp_mlx.train.step import BlockChoice, StepRunner
from mtp_mlx.train.trainer import Trainer, learning_rate
from tests.model.naive import quantized_model, random_adapter
from tests.tiny import VOCABULARY, tiny_model
from tests.train.training import Remembering, examples, metrics, settings_for, trainer_for

ROOT = Path(__file__).parents[2]


def weights(trainer: Trainer) -> dict[str, np.ndarray]:
    return {name: np.array(value) for name, value in trainer.method.tensors().items()}


def same(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> bool:
    return one.keys() == other.keys() and all(np.array_equal(one[name], other[name]) for name in one)


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


# --- learning -----------------------------------------------------------------------------------------------


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
    adapter, info = load_adapter(tmp_path / "adapter", build())
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


# --- steps --------------------------------------------------------------------------------------------------


def one_step(
    architecture: str = "qwen3", workers: int = 1, **options: Any
) -> tuple[Any, dict[str, mx.array]]:
    """Loss and gradients of three micro-batches."""
    model = tiny_model(architecture, seed=3)
    model.freeze()
    attached = attach(model, random_adapter(model))
    choice = BlockChoice(slots=3, chunk_blocks=4, depth_decay=0.8)
    runner = StepRunner(attached, SelfDistil(chunk_rows=16), choice, seed=0, workers=workers, **options)
    rows = examples(6)
    with closing(runner):
        loss, gradients, _ = runner([rows[0:2], rows[2:4], rows[4:6]], step=5)
        mx.eval(loss.total, gradients)
    return loss, dict(tree_flatten(gradients))


@pytest.mark.parametrize("architecture", ["qwen3", "gemma2", "olmoe"])
def test_grad_checkpoint_changes_no_loss(architecture: str) -> None:
    loss, gradients = one_step(architecture)
    other, recomputed = one_step(architecture, grad_checkpoint=True)
    assert loss.total.item() == other.total.item()
    assert gradients.keys() == recomputed.keys()
    for name, gradient in gradients.items():
        assert mx.abs(gradient).max().item() > 0, name
        np.testing.assert_allclose(np.array(recomputed[name]), np.array(gradient), rtol=1e-4, atol=1e-6)


def test_grad_checkpoint_saves_memory_and_is_undone(tmp_path: Path) -> None:
    def peak(grad_checkpoint: bool) -> int:
        model = tiny_model("llama", seed=3, num_hidden_layers=10)
        kinds = [type(layer) for layer in model.layers]
        trainer = trainer_for(
            tmp_path / str(grad_checkpoint), model=model, micro_batches=1, grad_checkpoint=grad_checkpoint
        )
        mx.clear_cache()
        mx.reset_peak_memory()
        trainer._one_step()
        assert [type(layer) for layer in model.layers] == kinds
        return mx.get_peak_memory() - mx.get_active_memory()

    assert peak(True) < 0.6 * peak(False)


def test_two_workers_give_the_gradients_of_one() -> None:
    loss, gradients = one_step(workers=1)
    other, side_by_side = one_step(workers=2)
    assert other.total.item() == loss.total.item()
    for name, gradient in gradients.items():
        np.testing.assert_allclose(np.array(side_by_side[name]), np.array(gradient), rtol=1e-3, atol=2e-5)


def test_workers_leave_no_stream_and_share_blas(monkeypatch: pytest.MonkeyPatch) -> None:
    """An MLX stream whose thread is gone aborts some processes at their end: each thread clears its own when the
    runner is closed. OpenBLAS has one thread per worker meanwhile, and its own number with a single worker."""
    events: list[tuple[str, str]] = []
    main, clear, work = threading.current_thread().name, mx.clear_streams, StepRunner._micro_batch

    def cleared() -> None:
        events.append((threading.current_thread().name, "cleared"))
        clear()

    def worked(self: StepRunner, *job: Any) -> Any:
        result = work(self, *job)
        events.append((threading.current_thread().name, "worked"))
        return result

    @contextmanager
    def counted(count: int) -> Iterator[None]:
        events.append((main, f"blas {count}"))
        yield
        events.append((main, "blas again"))

    monkeypatch.setattr(mx, "clear_streams", cleared)
    monkeypatch.setattr(StepRunner, "_micro_batch", worked)
    monkeypatch.setattr("mtp_mlx.train.step.blas_threads", counted)
    one_step(workers=2)
    assert events[0] == (main, "blas 1") and events[4] == (main, "blas again")
    threads: dict[str, list[str]] = {}
    for thread, event in events[1:4] + events[5:]:
        threads.setdefault(thread, []).append(event)
    assert main not in threads
    assert sorted(threads.values(), key=len) == [["worked", "cleared"], ["worked", "worked", "cleared"]]
    events.clear()
    one_step(workers=1)
    assert events == [(main, "worked")] * 3


@pytest.mark.parametrize("clip", [0.0, 0.5, 1e6])
def test_gradients_are_clipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, clip: float) -> None:
    """The norm in the metrics is the one before clipping; the optimizer never sees a larger one than `clip`."""
    listener = Remembering()
    trainer = trainer_for(tmp_path / "adapter", listener, clip=clip)
    seen = []

    def update(adapter: Any, gradients: Any) -> None:
        seen.append(sum(mx.sum(value**2).item() for _, value in tree_flatten(gradients)) ** 0.5)

    monkeypatch.setattr(trainer._optimizer, "update", update)
    trainer._one_step()
    norm = listener.steps[0].gradient_norm
    assert norm > 1
    assert seen == [pytest.approx(min(norm, clip or norm), rel=1e-4)]


def test_an_error_in_a_worker_is_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(StepRunner, "_micro_batch", lambda *_: (_ for _ in ()).throw(KeyError("broken")))
    with pytest.raises(KeyError, match="broken"):
        one_step(workers=2)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="OpenBLAS is used on Linux only")
def test_blas_threads_are_put_back() -> None:
    try:
        library = ctypes.CDLL(LIBRARY)
    except OSError:
        pytest.skip("OpenBLAS is not installed")
    before = library.openblas_get_num_threads()
    library.openblas_set_num_threads(2)
    try:
        with pytest.raises(KeyError), blas_threads(1):
            assert library.openblas_get_num_threads() == 1
            raise KeyError
        assert library.openblas_get_num_threads() == 2
    finally:
        library.openblas_set_num_threads(before)


def test_blas_threads_without_openblas(monkeypatch: pytest.MonkeyPatch) -> None:
    """The block runs all the same, and its errors come out."""
    monkeypatch.setattr("mtp_mlx.blas.LIBRARY", "libnone.so.0")
    ran = 0
    with blas_threads(1):
        ran += 1
    assert ran == 1
    with pytest.raises(KeyError), blas_threads(1):
        raise KeyError


# --- resume -------------------------------------------------------------------------------------------------


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
    assert read_config(out)["training"]["steps"] == state.step
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
            Trainer(tiny_model("qwen3", seed=3), rows[:9], rows[10:], settings_for(out), Remembering()),
        ),
        (r"the base model was \w{16}, now \w{16}", trainer_for(out, model=tiny_model("qwen3", seed=4))),
    ]
    for message, trainer in cases:
        with pytest.raises(MTPError, match=message):
            trainer.resume()
    assert trainer_for(out, save_every=7, measure_every=5, grad_checkpoint=True).resume()  # these may change


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
    assert read_info(tmp_path / "a").training["start_from"] == "adapter"
    listener = Remembering()
    other = trainer_for(tmp_path / "c", listener, start_from=whole_out, draft_vocab=61)
    assert "another draft vocabulary" in str(listener.messages), "told, since it changes what is drafted"
    for name, value in weights(other).items():
        if name != "draft_ids":
            np.testing.assert_allclose(value, weights(whole)[name], rtol=0.01, atol=1e-6)
    cases: dict[str, dict[str, Any]] = {
        "its base has fingerprint": {"model": tiny_model("qwen3", seed=4)},
        "trained with rank 4, these settings say 5": {"rank": 5},
        "trained with alpha 8.0, these settings say 64.0": {"alpha": 64.0},
    }
    for message, changes in cases.items():
        with pytest.raises(MTPError, match=message):
            trainer_for(tmp_path / "b", start_from=whole_out, **changes)


# --- failing ------------------------------------------------------------------------------------------------


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
    with pytest.raises(MTPError, match=r"in step 2 the loss is nan.*lower --learning-rate \(now 0.001\)"):
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
        r"warmup \(30\) is longer than the run \(steps 20\)": {"warmup": 30, "steps": 20},
        "block_share 0": {"block_share": 0.0},
        "learning_rate 0": {"learning_rate": 0.0},
        "max_length 8 holds no block of 9 slots; 11 does": {"max_length": 8, "slots": 9},
        "warmup .*; block_share 0": {"warmup": 13, "block_share": 0.0},
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
    trainer = Trainer(model, rows, [short], settings_for(tmp_path / "a", steps=3, batch_size=1), listener)
    assert listener.messages == ["1 rows left out: their responses have one token, slots need two"]
    assert trainer.run()
    assert trainer.agreement is None
    assert any("no held-out response has 4 tokens" in message for message in listener.messages)
    trainer.attached.detach()
    with pytest.raises(MTPError, match="no training row is long enough"):
        Trainer(model, [short], [], settings_for(tmp_path / "b"), listener)


@pytest.mark.parametrize("method", ["mask-tokens", "conf-adapt", "ptp"])
def test_rows_longer_than_a_sliding_window_are_refused_before_training(tmp_path: Path, method: str) -> None:
    overrides = {"layer_types": ["full_attention", "sliding_attention"], "sliding_window": 4}
    with pytest.raises(MTPError, match="sliding window of 4.*--max-length 4"):
        trainer_for(tmp_path / "adapter", model=tiny_model("llama", **overrides), method=method)


@pytest.mark.parametrize("method", ["mask-tokens", "conf-adapt", "ptp"])
def test_recurrent_trunks_are_refused_before_training(tmp_path: Path, method: str) -> None:
    with pytest.raises(MTPError, match="recurrent state"):
        trainer_for(tmp_path / "adapter", model=tiny_model("qwen3_next"), method=method)


# --- memory -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes", [{}, {"grad_checkpoint": True}, {"loss_rows": 32, "draft_vocab": 0}], ids=str
)
def test_memory_is_estimated_within_a_factor_of_two(tmp_path: Path, changes: dict[str, Any]) -> None:
    model = tiny_model("llama", seed=3, hidden_size=96, intermediate_size=192, num_hidden_layers=6)
    rows = [Example(np.random.default_rng(0).integers(3, VOCABULARY, 90).tolist(), 4)] * 4
    settings = settings_for(tmp_path / "a", micro_batches=1, chunk_blocks=16, **changes)
    trainer = Trainer(model, rows, [], settings, Remembering())
    estimate = estimate_memory(trainer.attached, rows, settings, trainer.workers)
    mx.clear_cache()
    mx.reset_peak_memory()
    trainer._one_step()
    used = mx.get_peak_memory() - mx.get_active_memory() + estimate.weights + estimate.adapter
    assert 0.5 < estimate.total / used < 2, (str(estimate), used)


def test_memory_warning() -> None:
    model = tiny_model("qwen3", seed=3)
    estimate = estimate_memory(attach(model, random_adapter(model)), examples(), settings_for(Path("out")))
    assert estimate.weights == sum(v.nbytes for _, v in tree_flatten(tiny_model("qwen3").parameters()))
    assert str(estimate).startswith("memory, estimated: ")
    assert too_much(estimate, machine_bytes=10**12) is None
    warning = too_much(estimate, machine_bytes=10**5)
    assert warning is not None and "the machine has 0.1 MB: lower --batch-size" in warning
    assert physical_memory() == os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
