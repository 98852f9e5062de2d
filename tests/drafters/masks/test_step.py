"""Proves that a step's gradients depend on neither workers nor recomputing, are clipped, and that errors come out."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

from mtp_mlx.drafters.masks.losses import SelfDistil
from mtp_mlx.drafters.masks.step import StepRunner
from mtp_mlx.drafters.slots.step import BlockChoice
from mtp_mlx.model.attach import attach
from mtp_mlx.train.plan import StepPlan
from tests.model.naive import random_adapter
from tests.tiny import tiny_model
from tests.train.training import Remembering, examples, trainer_for


def one_step(
    architecture: str = "qwen3", workers: int = 1, **options: Any
) -> tuple[Any, dict[str, mx.array]]:
    """Loss and gradients of three micro-batches."""
    model = tiny_model(architecture, seed=3)
    model.freeze()
    attached = attach(model, random_adapter(model))
    choice = BlockChoice(slots=3, chunk_blocks=4, depth_decay=0.8)
    plan = StepPlan(workers=workers, **options)
    runner = StepRunner(attached, SelfDistil(chunk_rows=16), choice, seed=0, plan=plan)
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
