"""The training loop: optimizer steps, metrics, checkpoints and measurements, resumable at any step.

What is trained, and on which loss, is up to a `Method`.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np

from mtp_mlx.adapter_folder import CONFIG_NAME, sidecar
from mtp_mlx.decode.rollback import check_decodes
from mtp_mlx.distributed import Peers
from mtp_mlx.errors import MTPError
from mtp_mlx.files import clear_errors, write_text
from mtp_mlx.model.attach import AttachedModel
from mtp_mlx.model.seams import embedding_rows
from mtp_mlx.train import checkpoint as checkpoints
from mtp_mlx.train.agreement import Agreement
from mtp_mlx.train.average import WeightAverage
from mtp_mlx.train.data import Example, check_examples, fingerprint
from mtp_mlx.train.dense_products import dense_products
from mtp_mlx.train.interrupts import interruptible
from mtp_mlx.train.memory import gigabytes, memory_of_one, peak_memory
from mtp_mlx.train.method import Method
from mtp_mlx.train.optimizer import build_optimizer, learning_rate
from mtp_mlx.train.order import EpochOrder
from mtp_mlx.train.plan import StepPlan
from mtp_mlx.train.settings import TrainSettings
from mtp_mlx.train.together import number, start_as_one, step_mean


@dataclass(frozen=True)
class StepReport:
    """A step as the metrics file records it; `seconds` is its wall time."""

    step: int
    loss: float
    parts: dict[str, float]
    learning_rate: float
    gradient_norm: float
    rows: int
    seconds: float


class Listener(Protocol):
    """Receives the progress of a run; the command line draws it."""

    def on_step(self, report: StepReport, total: int) -> None: ...

    def on_measurement(self, step: int, agreement: Agreement) -> None: ...

    def on_message(self, message: str) -> None: ...


STEPS_BEFORE_FORECAST = 3  # the first ones are slower


def duration(seconds: float) -> str:
    """A time in words, as in "2 h 05 min" or "40 s"."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min"


def check_out(out: Path) -> None:
    """Refuses to write an adapter over anything else.

    Raises:
        MTPError: `out` is a file, or a folder that is not empty and holds no adapter.
    """
    if not out.exists() or (out / CONFIG_NAME).is_file() or sidecar(out) is not None:
        return
    if not out.is_dir():
        raise MTPError(f"{out} is a file: `out` must be a new folder, or one with an adapter")
    if any(out.iterdir()):
        raise MTPError(
            f"{out} is a folder with other files, which the adapter would replace: give another `out`"
        )


class Trainer:
    """Trains an adapter for a base model.

    Args:
        method: class of the training method (`mtp_mlx.drafters.registry.method_class`).
        model: the base model, as mlx-lm loads it, quantised or not; it is frozen.
        train, held_out: examples.
        settings: of that method (`mtp_mlx.drafters.registry.settings_class`).
        listener: told about steps, measurements and messages.
        peers: the processes of the run, which must have the same model, data and settings; each computes its own
            micro-batches of every step.

    Raises:
        MTPError: the model cannot be attached to or cannot decode with drafts, `settings.out` is in use, or no
            example can be trained on, or one has an id that the model has no row for.
    """

    def __init__(
        self,
        method: type[Method[Any]],
        model: nn.Module,
        train: Sequence[Example],
        held_out: Sequence[Example],
        settings: TrainSettings,
        listener: Listener,
        peers: Peers | None = None,
    ) -> None:
        self.listener = listener
        self.peers = peers or Peers()
        check_out(settings.out)
        check_examples([*train, *held_out], embedding_rows(model))
        self._train, self._held_out = method.usable(train, settings, listener.on_message), held_out
        settings = replace(settings, memory=memory_of_one(settings.memory, self.peers))
        # The settings of the same run in one process, which checkpoints and adapters record.
        whole = replace(settings, micro_batches=settings.micro_batches * self.peers.size)
        self._whole = method.settled(whole, self._train)
        self.settings = settings = replace(self._whole, micro_batches=settings.micro_batches)
        mx.random.seed(settings.seed)
        check_decodes(model)
        model.freeze()
        self.method = method(model, train, settings, listener.on_message)
        self.estimate = self.method.estimate_memory(self._train, self.method.plan)
        self._optimizer = build_optimizer(settings)
        self._optimizer.init(self.method.module.trainable_parameters())
        self._average = WeightAverage(self.method.module, settings.ema)
        self._data_fingerprint = fingerprint(train)
        weights = {example.weight for example in self._train}
        self._order = EpochOrder(
            len(self._train),
            settings.seed,
            batch_size=settings.batch_size,
            lengths=[len(example) for example in self._train],
            weights=None if len(weights) == 1 else [example.weight for example in self._train],
        )
        self.step = 0
        self.loss: float | None = None
        self.agreement: Agreement | None = None
        self._measured_step = -1
        self._seconds = 0.0  # of the last step
        self._stop = threading.Event()  # this process was asked to stop
        self._all_stop = False  # a process was, and all know

    @property
    def _ending(self) -> bool:
        """Whether to stop now; all processes of a run must stop after the same step."""
        return self._stop.is_set() if self.peers.alone else self._all_stop

    @property
    def adapter(self) -> Any:
        """The trained module."""
        return self.method.module

    @property
    def attached(self) -> AttachedModel:
        """The base model with the trained weights attached."""
        return self.method.attached

    @property
    def plan(self) -> StepPlan:
        """How steps are cut."""
        return self.method.plan

    @property
    def workers(self) -> int:
        """Number of micro-batches computed in parallel."""
        return self.method.plan.workers

    # --- files --------------------------------------------------------------------------------------------

    @property
    def checkpoint_path(self) -> Path:
        """OUT.checkpoint.safetensors, beside the adapter folder."""
        return self._beside(".checkpoint.safetensors")

    @property
    def metrics_path(self) -> Path:
        """OUT.metrics.jsonl, one line per step and per measurement."""
        return self._beside(".metrics.jsonl")

    def _beside(self, ending: str) -> Path:
        out = self.settings.out.resolve()
        return out.with_name(out.name + ending)

    def resume(self) -> bool:
        """Restores the checkpoint if there is one, and drops metrics of later steps; whether there was one.

        Raises:
            MTPError: the checkpoint is damaged, or belongs to other settings, data or another base model.
        """
        if not self.peers.leads:
            return False  # process 0 has the files, and `run` shares what it has read
        checkpoints.remove_leftovers(self.checkpoint_path)
        if not self.checkpoint_path.exists():
            if self.metrics_path.exists():
                write_text(self.metrics_path, "")
            return False
        state = checkpoints.load_checkpoint(self.checkpoint_path)
        state.settings = self.method.as_read_today(state.settings)
        checkpoints.check_resumable(
            state,
            self.checkpoint_path,
            self._whole,
            self._data_fingerprint,
            self.method.fingerprint,
            self.method.base_sample,
        )
        checkpoints.restore(state, self.method, self._optimizer, self._average)
        self.step = state.step
        for row in self._drop_metrics_behind(state.step):
            self.loss = row.get("loss", self.loss)
            if "acceptance" in row:
                self.agreement = Agreement(row["acceptance"], row.get("blocks", 0))
                self._measured_step = row["step"]
        return True

    def _drop_metrics_behind(self, step: int) -> list[dict[str, Any]]:
        """The metrics up to `step`; later ones are removed from the file, since these steps run again."""
        if not self.metrics_path.exists():
            return []
        kept = []
        for line in self.metrics_path.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                row = json.loads(line)
            except ValueError:
                continue  # a line that was being written when the run was killed
            if isinstance(row, dict) and row.get("step", step + 1) <= step:
                kept.append(row)
        write_text(self.metrics_path, "".join(json.dumps(row) + "\n" for row in kept))
        return kept

    def _append_metrics(self, row: dict[str, Any]) -> None:
        if not self.peers.leads:
            return
        with clear_errors(self.metrics_path):
            self.metrics_path.parent.mkdir(parents=True, exist_ok=True)
            with open(self.metrics_path, "a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")

    def save(self) -> None:
        """Writes the checkpoint (in process 0)."""
        if not self.peers.leads:
            return
        checkpoints.save_checkpoint(
            self.checkpoint_path,
            self.method,
            self._optimizer,
            self._average,
            self.step,
            self._whole,
            self._data_fingerprint,
            self.method.fingerprint,
            self.method.base_sample,
        )

    def provenance(self) -> dict[str, Any]:
        """How the adapter was trained, for its folder."""
        settings = self._whole
        return {
            **checkpoints.comparable(settings),
            "steps": self.step,
            "planned_steps": settings.steps,
            "start_from": settings.start_from
            and settings.start_from.name,  # its name: paths are of this machine only
            "examples": len(self._train),
            "data_fingerprint": self._data_fingerprint,
        }

    def export(self) -> None:
        """Writes the adapter folder (in process 0)."""
        if not self.peers.leads:
            return
        check_out(self.settings.out)
        acceptance = self.agreement.acceptance if self.agreement else []
        with self._average.in_place():
            self.method.export(self.settings.out, self.provenance(), acceptance)

    # --- the loop -----------------------------------------------------------------------------------------

    def run(self, end: Callable[[], None] | None = None) -> bool:
        """Trains to the last step; False if it was interrupted before, after saving its state.

        SIGINT and SIGTERM end the loop after the current step; a second one raises KeyboardInterrupt, without saving.

        Args:
            end: ends the process after the second signal, if a step would go on for long (`interruptible`).

        Raises:
            MTPError: the loss is not finite, or a file cannot be written.
        """
        with (
            interruptible(self._stop, self._tell_stopping, end),
            closing(self.method),
            dense_products(self.attached),
        ):
            given = {
                **checkpoints.comparable(self.settings),
                "the data's fingerprint": self._data_fingerprint,
                "the model's fingerprint": self.method.fingerprint,
                "the model's weights": self.method.base_sample.key(),
            }
            self.step = start_as_one(
                self.peers, given, self.step, self.method, self._optimizer, self._average
            )
            first = self.step
            while self.step < self.settings.steps and not self._ending:
                self._one_step()
                if self.step == first + STEPS_BEFORE_FORECAST:
                    self._forecast()
                due = self.settings.measure_every and self.step % self.settings.measure_every == 0
                if due and self.step < self.settings.steps:
                    self.measure()
                if self.step % self.settings.save_every == 0:
                    self.save()
            self.save()
            if not self._ending and self._measured_step != self.step:
                self.measure()
            self.export()
        if self._ending:
            self.listener.on_message(f"stopped after step {self.step}; the same command resumes from there")
        return not self._ending

    def _tell_stopping(self) -> None:
        self.listener.on_message("stopping after this step; a second time stops without saving it")

    def _one_step(self) -> None:
        started = time.perf_counter()
        settings = self.settings
        part = self.step * self.peers.size + self.peers.rank  # micro-batches are numbered as in one process
        first = part * settings.micro_batches
        examples = [
            [self._train[index] for index in self._order.batch(first + offset)]
            for offset in range(settings.micro_batches)
        ]
        loss, gradients, rows = self.method.gradients(examples, part)
        mean = step_mean(self.peers, loss, gradients, rows, self._stop.is_set())
        self._all_stop = mean.stop
        gradients, norm = optim.clip_grad_norm(mean.gradients, settings.clip or float("inf"))
        rate = learning_rate(settings, self.step)
        self._optimizer.learning_rate = rate
        self.method.apply_update(self._optimizer, gradients)
        mx.eval(self.method.module.parameters(), self._optimizer.state, norm)
        value, length = mean.loss, number(norm)
        if not (np.isfinite(value) and np.isfinite(length)):
            raise MTPError(
                f"in step {self.step + 1} the loss is {value} and the gradient norm {length}: lower "
                f"`learning_rate` (now {settings.learning_rate}); this step was not saved"
            )
        self._average.update(self.step)
        self.step += 1
        self.loss, self._seconds = value, time.perf_counter() - started
        report = StepReport(self.step, value, mean.parts, rate, length, mean.rows, self._seconds)
        self._append_metrics(vars(report))
        self.listener.on_step(report, settings.steps)

    def _forecast(self) -> None:
        """Tells how much time is left, by the last step's, and how much memory the run has taken."""
        left = self.settings.steps - self.step
        if left > 0:
            self.listener.on_message(
                f"about {duration(left * self._seconds)} left, at {self._seconds:.1f} s a step; "
                f"{gigabytes(peak_memory())} of memory so far"
            )

    def measure(self) -> None:
        """Measures acceptance per depth on the held-out rows."""
        if not self._held_out:
            return
        size = self.settings.batch_size
        batches = [self._held_out[start : start + size] for start in range(0, len(self._held_out), size)]
        with self._average.in_place():
            agreement = self.method.measure(batches)
        self._measured_step = self.step
        if not agreement.blocks:
            self.listener.on_message(
                f"acceptance not measured: no held-out response has {self.method.depth + 1} tokens"
            )
            return
        self.agreement = agreement
        self._append_metrics(
            {
                "step": self.step,
                "acceptance": agreement.acceptance,
                "tokens_per_step": agreement.tokens_per_step,
                "blocks": agreement.blocks,
            }
        )
        self.listener.on_measurement(self.step, self.agreement)
