"""Training by Parallel Token Prediction (arXiv 2512.21323): gated LoRA, and slots that carry uniforms."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mlx.nn as nn

from mtp_mlx.drafters.ptp.agreement import measure_ptp
from mtp_mlx.drafters.ptp.config import PTPConfig, TeacherSampling
from mtp_mlx.drafters.ptp.folder import config_of, ptp_header, save
from mtp_mlx.drafters.ptp.loss import PTPLoss
from mtp_mlx.drafters.ptp.options import PTPSettings
from mtp_mlx.drafters.ptp.step import PTPRunner
from mtp_mlx.drafters.ptp.targets import UniformChoice
from mtp_mlx.drafters.ptp.weights import PTPAdapter, new_ptp_adapter
from mtp_mlx.drafters.slots.memory import estimate_memory
from mtp_mlx.drafters.slots.method import SlotMethod, block_choice, settled_share
from mtp_mlx.model.attach import attach
from mtp_mlx.train.agreement import Agreement
from mtp_mlx.train.data import Example
from mtp_mlx.train.memory import MemoryEstimate
from mtp_mlx.train.method import Tell
from mtp_mlx.train.plan import StepPlan


def ptp_shape(settings: PTPSettings) -> PTPConfig:
    """Shape of the adapter that these settings train."""
    return PTPConfig(
        variant=settings.variant,
        embedding=settings.u_embedding,
        slots=settings.slots,
        rank=settings.rank,
        alpha=settings.alpha,
        target_modules=settings.target_modules,
        independent=settings.independent,
        draft_vocab_size=settings.draft_vocab or 0,
        teacher=TeacherSampling(
            temperature=settings.teacher_temperature,
            top_k=settings.teacher_top_k,
            top_p=settings.teacher_top_p,
            min_p=settings.teacher_min_p,
        ),
    )


def ptp_loss(settings: PTPSettings) -> PTPLoss:
    """The loss of these settings; only the logits of C-PTP are on the scale of the teacher's logits."""
    scale = settings.teacher_temperature if settings.variant == "c" else 1.0
    return PTPLoss(settings.ptp_loss, scale or 1.0, settings.loss_rows)


class TrainPTP(SlotMethod[PTPSettings]):
    """Trains a PTP adapter.

    Raises:
        MTPError: the model cannot be attached to or cannot decode with drafts, or `settings.start_from` does not
            fit.
    """

    def __init__(self, model: nn.Module, train: Sequence[Example], settings: PTPSettings, tell: Tell) -> None:
        super().__init__(model, train, settings, tell)
        draft_ids = self.draft_vocabulary(train)
        self.adapter: PTPAdapter = new_ptp_adapter(model, ptp_shape(settings), draft_ids)
        if settings.start_from is not None:
            self.start_from(settings.start_from, config_of, tell)
        self.attached = attach(model, self.adapter)
        self.plan = self.choose_plan(train)
        self._runner = PTPRunner(
            self.attached,
            ptp_loss(settings),
            block_choice(settings, self.plan),
            UniformChoice(settings.u_beta, settings.greedy_share, settings.uniforms),
            settings.seed,
            plan=self.plan,
        )

    @classmethod
    def settled(cls, settings: PTPSettings, train: Sequence[Example]) -> PTPSettings:
        """See `Method`."""
        return settled_share(settings, train)

    def measure(self, batches: Sequence[Sequence[Example]]) -> Agreement:
        """See `Method`."""
        return measure_ptp(self.attached, batches, self.settings.slots)

    def estimate_memory(self, examples: Sequence[Example], plan: StepPlan) -> MemoryEstimate:
        """See `Method`."""
        choice = block_choice(self.settings, plan)
        return estimate_memory(self.attached, examples, self.settings, choice, plan)

    def export(self, folder: Path, training: dict[str, Any], acceptance: list[float]) -> None:
        """See `Method`."""
        about = self.about(training, acceptance)
        header = ptp_header(self.adapter.config, self.settings.model, self.fingerprint, **about)
        save(folder, self.adapter, header)
