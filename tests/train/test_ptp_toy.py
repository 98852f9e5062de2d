"""Trained on a toy language in the test run, both PTP variants decode at least twice the tokens per step of slots
that know nothing of each other, at temperature 1; and inverse-autoregressive training needs no teacher."""

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
STEPS = {"o": 150, "c": 120}
RATE = {"o": 5e-3, "c": 3e-3}


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
        batch_size=12,
        micro_batches=1,
        block_share=0.6,
        u_beta=1.0,
        learning_rate=RATE[variant],
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
    for seed in range(6):
        prompt = toy.sample(1, 50 + seed, 2)[0].tolist()
        sampling = SamplingConfig(temperature=1.0, seed=seed)
        policy = FixedPolicy("quadratic", SLOTS)
        steps = mtp_generate_step(prompt, model, max_tokens=16, sampling=sampling, policy=policy, stats=stats)
        text = [item.token for item in steps]
        if seed == 0:
            plain = mtp_generate_step(prompt, model, max_tokens=16, sampling=sampling)
            assert text == [item.token for item in plain]
    return stats.tokens_per_step


@pytest.mark.parametrize("variant", ["o", "c"])
def test_twice_the_tokens_per_step_of_independent_slots(tmp_path: Path, variant: str) -> None:
    """The control has the same code, data and steps, and a constant in place of uniforms."""
    with_uniforms = tokens_per_step(trained(tmp_path / "ptp", variant, independent=False))
    control = tokens_per_step(trained(tmp_path / "control", variant, independent=True))
    print(f"variant {variant}: {with_uniforms:.2f} tokens per step, independent slots {control:.2f}")
    assert with_uniforms >= 2 * control


HALVES, SHORT, TRAINING_STEPS = 2, 12, 120


def test_inverse_autoregressive_training_reaches_the_teachers_perplexity() -> None:
    """From data alone: slots behind a token, with uniforms of the model's own, are as sure of the text as the teacher
    is, which sees every token before; slots that know nothing of each other would be at twice its perplexity.

    The teacher is the same model after next-token training; the student starts from it and is trained on text only.
    """
    model = toy.toy_model(HALVES)
    toy.train_ar(model, 60, HALVES)
    fresh = toy.sample(128, 9, SHORT, HALVES)
    teacher = toy.perplexity(model, fresh)
    assert teacher < 1.05 * HALVES
    student = attach(model, new_ptp_adapter(model, PTPConfig(variant="c", slots=2, rank=8)))
    training = InverseAR(student, slots=2, anchors=6)
    before = training.perplexity(fresh)
    optimizer = toy.optimizer_for_toys()
    for step in range(TRAINING_STEPS):
        optimizer.learning_rate = toy.rate_at(step, TRAINING_STEPS, 5e-3)
        _, gradients = training(toy.sample(32, 5000 + step, SHORT, HALVES), step)
        optimizer.update(model, optim.clip_grad_norm(gradients, 1.0)[0])
        mx.eval(model.parameters(), optimizer.state)
    after = training.perplexity(fresh)
    print(f"perplexity: teacher {teacher:.3f}, slots {before:.3f} before and {after:.3f} after training")
    assert before > 1.5 * teacher and after < 1.02 * teacher
