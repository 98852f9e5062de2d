"""Training gated-LoRA mask tokens (arXiv 2507.11851): mask tokens, LoRA on their rows only, and a sampler head."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.nn as nn
import mlx.optimizers as optim
from mlx.utils import tree_map

from mtp_mlx.drafters.masks.folder import config_of, mask_header, save
from mtp_mlx.drafters.masks.losses import Apple, Objective, SelfDistil
from mtp_mlx.drafters.masks.options import MaskTokenSettings
from mtp_mlx.drafters.masks.step import StepRunner
from mtp_mlx.drafters.masks.weights import MaskAdapter, MaskAdapterConfig, new_adapter
from mtp_mlx.drafters.slots.agreement import measure_agreement
from mtp_mlx.drafters.slots.memory import estimate_memory
from mtp_mlx.drafters.slots.method import SlotMethod, block_choice, settled_share
from mtp_mlx.drafters.slots.options import SlotSettings
from mtp_mlx.model.attach import attach
from mtp_mlx.train.agreement import Agreement
from mtp_mlx.train.data import Example
from mtp_mlx.train.memory import MemoryEstimate
from mtp_mlx.train.method import Tell
from mtp_mlx.train.plan import StepPlan

LCM_WEIGHT = {"apple": 1.0, "self-distill": 0.0}  # by default, for each objective


def mask_shape(settings: SlotSettings, sampler_width: int) -> MaskAdapterConfig:
    """Shape of the adapter that these settings train; without a sampler head, all slots share one mask token."""
    return MaskAdapterConfig(
        slots=settings.slots,
        rank=settings.rank,
        alpha=settings.alpha,
        target_modules=settings.target_modules,
        sampler_width=sampler_width,
        draft_vocab_size=settings.draft_vocab or 0,
        shared_mask=sampler_width == 0,
    )


def build_objective(settings: MaskTokenSettings) -> Objective:
    """The objective that `settings.objective` names."""
    kind = Apple if settings.objective == "apple" else SelfDistil
    return kind(lcm_weight=settings.lcm_weight or 0.0, chunk_rows=settings.loss_rows)


class MaskTokens(SlotMethod[MaskTokenSettings]):
    """Trains a mask-token adapter.

    Raises:
        MTPError: the model cannot be attached to or cannot decode with drafts, or `settings.start_from` does not
            fit.
    """

    def __init__(
        self, model: nn.Module, train: Sequence[Example], settings: MaskTokenSettings, tell: Tell
    ) -> None:
        super().__init__(model, train, settings, tell)
        draft_ids = self.draft_vocabulary(train)
        self.adapter: MaskAdapter = new_adapter(
            model, mask_shape(settings, settings.sampler_width), draft_ids
        )
        if settings.start_from is not None:
            self.start_from(settings.start_from, config_of, tell)
        self.attached = attach(model, self.adapter)
        self.plan = self.choose_plan(train)
        self._runner = StepRunner(
            self.attached,
            build_objective(settings),
            block_choice(settings, self.plan),
            settings.seed,
            plan=self.plan,
        )

    @classmethod
    def settled(cls, settings: MaskTokenSettings, train: Sequence[Example]) -> MaskTokenSettings:
        """See `Method`."""
        weight = LCM_WEIGHT[settings.objective] if settings.lcm_weight is None else settings.lcm_weight
        return replace(settled_share(settings, train), lcm_weight=weight)

    @classmethod
    def as_read_today(cls, recorded: dict[str, Any]) -> dict[str, Any]:
        """See `Method`: the weight of latent matching was recorded, and not read, beside self-distillation."""
        if "learn_from" in recorded or recorded.get("objective") != "self-distill":
            return recorded
        return {**recorded, "lcm_weight": 0.0}

    def apply_update(self, optimizer: optim.Optimizer, gradients: dict) -> None:
        """See `Method`; the sampler head takes only the fraction `sampler_rate` of the update.

        Its wide dense layers need a smaller learning rate than low-rank factors that start at zero, and with Adam a
        fraction of the update is a fraction of the rate.
        """
        sampler, rate = self.adapter.sampler, self.settings.sampler_rate
        before = sampler.parameters()
        optimizer.update(self.adapter, gradients)
        after = sampler.parameters()
        sampler.update(tree_map(lambda old, new: old + rate * (new - old), before, after))

    def measure(self, batches: Sequence[Sequence[Example]]) -> Agreement:
        """See `Method`."""
        return measure_agreement(self.attached, batches, self.settings.slots)

    def estimate_memory(self, examples: Sequence[Example], plan: StepPlan) -> MemoryEstimate:
        """See `Method`."""
        choice = block_choice(self.settings, plan)
        return estimate_memory(self.attached, examples, self.settings, choice, plan)

    def export(self, folder: Path, training: dict[str, Any], acceptance: list[float]) -> None:
        """See `Method`."""
        about = self.about(training, acceptance)
        header = mask_header(self.adapter.config, self.settings.model, self.fingerprint, **about)
        save(folder, self.adapter, header)
