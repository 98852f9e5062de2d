"""The training loop: batches in order, one optimizer step each, metrics, checkpoints, measurements.

What a loss is lives in `objectives/`, what a step computes in `step.py`; this file owns time: order, resume,
interruption and what is written to disk.
"""

from __future__ import annotations

import json
import signal
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np

from mtp_mlx.adapter import AdapterInfo, base_fingerprint, save_adapter
from mtp_mlx.errors import MTPError
from mtp_mlx.files import clear_errors, write_text
from mtp_mlx.model.attach import AttachedModel, attach, new_adapter
from mtp_mlx.train import checkpoint as checkpoints
from mtp_mlx.train.agreement import Agreement, measure_agreement
from mtp_mlx.train.data import Example, fingerprint
from mtp_mlx.train.objectives.apple import Apple
from mtp_mlx.train.objectives.base import Objective
from mtp_mlx.train.objectives.self_distil import SelfDistil
from mtp_mlx.train.order import EpochOrder
from mtp_mlx.train.settings import TrainSettings
from mtp_mlx.train.step import BlockChoice, StepRunner


@dataclass(frozen=True)
class StepReport:
    """One line of the metrics file."""

    step: int
    loss: float
    parts: dict[str, float]
    learning_rate: float
    gradient_norm: float
    rows: int
    seconds: float


class Listener(Protocol):
    """Who is told about progress; the CLI draws it."""

    def on_step(self, report: StepReport, total: int) -> None: ...

    def on_measurement(self, step: int, agreement: Agreement) -> None: ...

    def on_message(self, message: str) -> None: ...


def build_objective(settings: TrainSettings) -> Objective:
    """The objective that `settings.objective` names."""
    if settings.objective == "apple":
        return Apple(lcm_weight=settings.lcm_weight, chunk_rows=settings.loss_rows)
    return SelfDistil(chunk_rows=settings.loss_rows)


def learning_rate(settings: TrainSettings, step: int) -> float:
    """Rate of step `step` (from 0): linear warm-up, then the schedule down to final_rate * peak."""
    if step < settings.warmup:
        return settings.learning_rate * (step + 1) / settings.warmup
    if settings.schedule == "constant":
        return settings.learning_rate
    progress = (step - settings.warmup) / max(1, settings.steps - settings.warmup)
    share = 0.5 * (1 + np.cos(np.pi * progress)) if settings.schedule == "cosine" else 1 - progress
    return float(settings.learning_rate * (settings.final_rate + (1 - settings.final_rate) * share))


def draft_vocabulary(examples: Sequence[Example], size: int, vocab_size: int) -> mx.array | None:
    """[size] int32 sorted ids most used in the responses (design 2.6); None for the whole vocabulary."""
    if size == 0 or size >= vocab_size:
        return None
    counts = Counter(token for example in examples for token in example.tokens[example.loss_start :])
    order = [token for token, _ in sorted(counts.items(), key=lambda item: (-item[1], item[0]))[:size]]
    if len(order) < size:  # low ids are the frequent merges of a byte-pair vocabulary
        known = set(order)
        order += [token for token in range(vocab_size) if token not in known][: size - len(order)]
    return mx.array(sorted(order), dtype=mx.int32)


class Trainer:
    """Trains a mask-token adapter for `model` (its weights stay untouched).

    Args:
        model: an mlx-lm model, not attached; quantised or not.
        train, held_out: examples.
        settings: see `TrainSettings`.
        listener: told about steps, measurements and messages.
    """

    def __init__(
        self,
        model: nn.Module,
        train: Sequence[Example],
        held_out: Sequence[Example],
        settings: TrainSettings,
        listener: Listener,
    ) -> None:
        self.settings, self.listener = settings, listener
        self._train, self._held_out = train, held_out
        mx.random.seed(settings.seed)
        model.freeze()
        self._fingerprint = base_fingerprint(model)
        vocab_size = attach(model).vocab_size
        draft_ids = draft_vocabulary(train, settings.draft_vocab, vocab_size)
        self.adapter = new_adapter(model, settings.adapter_shape(), draft_ids)
        self.attached: AttachedModel = attach(model, self.adapter)
        self._optimizer = optim.AdamW(
            learning_rate=0.0,
            betas=[0.9, 0.99],
            weight_decay=settings.weight_decay,
            bias_correction=True,  # without it the first hundreds of steps are up to 4 times too large
        )
        self._optimizer.init(self.adapter.trainable_parameters())
        self._data_fingerprint = fingerprint(train)
        self._order = EpochOrder(
            len(train),
            settings.seed,
            batch_size=settings.batch_size,
            lengths=[len(example) for example in train],
        )
        choice = BlockChoice(
            slots=settings.slots,
            share=settings.block_share,
            most=settings.max_blocks,
            chunk_blocks=settings.chunk_blocks,
            depth_decay=settings.depth_decay,
        )
        self._runner = StepRunner(
            self.attached, build_objective(settings), choice, settings.seed, workers=self._workers()
        )
        self.step = 0
        self.agreement: Agreement | None = None
        self._stop = False

    def _workers(self) -> int:
        """Micro-batches computed side by side: up to two on a CPU, one on a GPU."""
        return min(2, self.settings.micro_batches) if mx.default_device() == mx.Device(mx.cpu) else 1

    # --- files --------------------------------------------------------------------------------------------

    @property
    def checkpoint_path(self) -> Path:
        """OUT.checkpoint.safetensors, beside the adapter folder."""
        return self.settings.out.with_name(self.settings.out.name + ".checkpoint.safetensors")

    @property
    def metrics_path(self) -> Path:
        """OUT.metrics.jsonl, one line per step or measurement."""
        return self.settings.out.with_name(self.settings.out.name + ".metrics.jsonl")

    def resume(self) -> bool:
        """Continues from the checkpoint, if there is one; metrics behind it are dropped.

        Raises:
            MTPError: the checkpoint is damaged or belongs to other settings or data.
        """
        if not self.checkpoint_path.exists():
            if self.metrics_path.exists():
                write_text(self.metrics_path, "")
            return False
        state = checkpoints.load_checkpoint(self.checkpoint_path)
        checkpoints.check_resumable(state, self.checkpoint_path, self.settings, self._data_fingerprint)
        checkpoints.restore(state, self.adapter, self._optimizer)
        self.step = state.step
        self._drop_metrics_behind(state.step)
        return True

    def _drop_metrics_behind(self, step: int) -> None:
        """Removes lines of steps that the checkpoint does not contain: they will be run again."""
        if not self.metrics_path.exists():
            return
        kept = []
        for line in self.metrics_path.read_text(encoding="utf-8").splitlines():
            try:
                row = json.loads(line)
            except ValueError:
                continue  # the line being written when the run was killed
            if row["step"] <= step:
                kept.append(line)
        write_text(self.metrics_path, "".join(line + "\n" for line in kept))

    def _append_metrics(self, row: dict[str, Any]) -> None:
        with clear_errors(self.metrics_path):
            self.metrics_path.parent.mkdir(parents=True, exist_ok=True)
            with open(self.metrics_path, "a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")

    def save(self) -> None:
        """Writes the checkpoint."""
        checkpoints.save_checkpoint(
            self.checkpoint_path,
            self.adapter,
            self._optimizer,
            self.step,
            self.settings,
            self._data_fingerprint,
        )

    def info(self, training: dict[str, Any] | None = None) -> AdapterInfo:
        """What the adapter folder will say."""
        settings = self.settings
        provenance: dict[str, Any] = {
            "objective": settings.objective,
            "steps": self.step,
            "learning_rate": settings.learning_rate,
            "examples": len(self._train),
            "data_fingerprint": self._data_fingerprint,
            "seed": settings.seed,
            **checkpoints.comparable(settings),
            **(training or {}),
        }
        return AdapterInfo(
            base_name=settings.model,
            base_fingerprint=self._fingerprint,
            shape=self.adapter.config,
            training=provenance,
            acceptance=self.agreement.acceptance if self.agreement else [],
        )

    def export(self) -> None:
        """Writes the adapter folder."""
        save_adapter(self.settings.out, self.adapter, self.info())

    # --- the loop -----------------------------------------------------------------------------------------

    def run(self) -> bool:
        """Trains to the last step; True if it got there, False if it was interrupted (state is saved).

        Raises:
            MTPError: the loss is no longer finite, or a file cannot be written.
        """
        with self._interruptible():
            while self.step < self.settings.steps and not self._stop:
                self._one_step()
                due = self.settings.measure_every and self.step % self.settings.measure_every == 0
                if due and self.step < self.settings.steps:
                    self.measure()
                if self.step % self.settings.save_every == 0:
                    self.save()
        if self._stop:
            self.save()
            self.export()
            self.listener.on_message(f"stopped after step {self.step}; the same command continues from there")
            return False
        self.measure()
        self.save()
        self.export()
        return True

    def _one_step(self) -> None:
        started = time.perf_counter()
        settings = self.settings
        first = self.step * settings.micro_batches
        examples = [
            [self._train[index] for index in self._order.batch(first + offset)]
            for offset in range(settings.micro_batches)
        ]
        loss, gradients, rows = self._runner(examples, self.step)
        norm = mx.zeros(())
        if settings.clip:
            gradients, norm = optim.clip_grad_norm(gradients, settings.clip)
        rate = learning_rate(settings, self.step)
        self._optimizer.learning_rate = rate
        self._optimizer.update(self.adapter, gradients)
        mx.eval(self.adapter.parameters(), self._optimizer.state, loss.total, norm)
        value = loss.total.item()
        if not np.isfinite(value):
            raise MTPError(
                f"the loss is {value} in step {self.step + 1}: lower --learning-rate (now {settings.learning_rate}); "
                f"the last checkpoint is {self.checkpoint_path}"
            )
        self.step += 1
        parts = {name: float(part.item()) for name, part in loss.parts.items()}
        report = StepReport(
            self.step, float(value), parts, rate, float(norm.item()), rows, time.perf_counter() - started
        )
        self._append_metrics(vars(report))
        self.listener.on_step(report, settings.steps)

    def measure(self) -> None:
        """Acceptance per depth on the held-out rows."""
        if not self._held_out:
            return
        size = self.settings.batch_size
        batches = [self._held_out[start : start + size] for start in range(0, len(self._held_out), size)]
        self.agreement = measure_agreement(self.attached, batches, self.settings.slots)
        self._append_metrics(
            {
                "step": self.step,
                "acceptance": self.agreement.acceptance,
                "tokens_per_step": self.agreement.tokens_per_step,
            }
        )
        self.listener.on_measurement(self.step, self.agreement)

    @contextmanager
    def _interruptible(self) -> Iterator[None]:
        """Ctrl-C and a polite kill end the loop after the step in progress (main thread only)."""

        def stop(*_: Any) -> None:
            self._stop = True

        try:
            previous = {name: signal.signal(name, stop) for name in (signal.SIGINT, signal.SIGTERM)}
        except ValueError:  # not the main thread: the caller's business
            yield
            return
        try:
            yield
        finally:
            for name, handler in previous.items():
                signal.signal(name, handler)
