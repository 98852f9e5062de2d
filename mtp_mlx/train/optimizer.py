"""The optimizer of a training run, and the learning rate of each of its steps."""

from __future__ import annotations

import mlx.optimizers as optim
import numpy as np

from mtp_mlx.train.settings import TrainSettings


def learning_rate(settings: TrainSettings, step: int) -> float:
    """Learning rate of step `step`, from 0: linear warm-up, then the schedule down to final_rate * peak."""
    warmup = settings.warmup or 0
    if step < warmup:
        return settings.learning_rate * (step + 1) / warmup
    if settings.schedule == "constant":
        return settings.learning_rate
    progress = (step - warmup) / max(1, settings.steps - warmup)
    share = 0.5 * (1 + np.cos(np.pi * progress)) if settings.schedule == "cosine" else 1 - progress
    return float(settings.learning_rate * (settings.final_rate + (1 - settings.final_rate) * share))


def build_optimizer(settings: TrainSettings) -> optim.AdamW:
    """AdamW; its learning rate is set before every step."""
    return optim.AdamW(
        learning_rate=0.0,
        betas=[0.9, 0.99],
        weight_decay=settings.weight_decay,
        bias_correction=True,  # without it, updates of the first few hundred steps are up to 4 times too large
    )
