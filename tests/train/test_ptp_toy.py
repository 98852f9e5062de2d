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
        learning_rate=5e-3,
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
    for seed in range(4):
        prompt = toy.sample(1, 50 + seed, 2)[0].tolist()
        sampling = SamplingConfig(temperature=1.0, seed=seed)
        policy = FixedPolicy("quadratic", SLOTS)
        steps = mtp_generate_step(prompt, model, max_tokens=26, sampling=sampling, policy=policy, stats=stats)
        text = [item.token for item in steps]
        if seed == 0:
            plain = mtp_generate_step(prompt, model, max_tokens=26, sampling=sampling)
            assert text == [item.token for item in plain]
    return stats.tokens_per_step


@pytest.mark.parametrize("variant", ["o", "c"])
def test_twice_the_tokens_per_step_of_independent_slots(tmp_path: Path, variant: str) -> None:
    """The control has the same code, data and steps, and a constant in place of uniforms."""
    with_uniforms = tokens_per_step(trained(tmp_path / "ptp", variant, independent=False))
    control = tokens_per_step(trained(tmp_path / "control", variant, independent=True))
    print(f"variant {variant}: {with_uniforms:.2f} tokens per step, independent slots {control:.2f}")
    assert with_uniforms >= 2 * control


HALVES, SHORT, TRAINING_STEPS = 2, 12, 150
WITHIN = 1.08  # of the teacher's perplexity; see the test


def test_inverse_autoregressive_training_comes_near_the_teachers_perplexity() -> None:
    """From data alone: slots behind a token, with uniforms of the model's own, are nearly as sure of the text as the
    teacher, which sees every token before; slots that know nothing of each other would be at twice its perplexity.

    The teacher is the same model after next-token training; the student starts from it and is trained on text only,
    real rows more slowly than slots, whose uniforms lie at edges that real rows move.
    """
    model = toy.toy_model(HALVES)
    toy.train_ar(model, 200, HALVES)
    fresh = toy.sample(128, 9, SHORT, HALVES)
    teacher = toy.perplexity(model, fresh)
    assert teacher < 1.01 * HALVES
    student = attach(model, new_ptp_adapter(model, PTPConfig(variant="c", slots=2, rank=8)))
    training = InverseAR(student, slots=2, anchors=6)
    before = training.perplexity(fresh)
    of_slots, of_base = toy.optimizer_for_toys(), toy.optimizer_for_toys()
    optimizer = optim.MultiOptimizer([of_slots, of_base], [_is_of_slots])
    for step in range(TRAINING_STEPS):
        of_slots.learning_rate = toy.rate_at(step, TRAINING_STEPS, 6e-3)
        of_base.learning_rate = 0.03 * of_slots.learning_rate
        _, gradients = training(toy.sample(32, 5000 + step, SHORT, HALVES), step)
        optimizer.update(model, optim.clip_grad_norm(gradients, 1.0)[0])
        mx.eval(model.parameters(), optimizer.state)
    after, again = training.perplexity(fresh), toy.perplexity(model, fresh)
    print(f"perplexity: teacher {teacher:.3f}, slots {before:.3f} before and {after:.3f} after training")
    assert before > 1.5 * teacher and after < WITHIN * teacher
    assert again < 1.02 * teacher  # next-token prediction has not suffered


def _is_of_slots(path: str, _: object) -> bool:
    """Whether a parameter of the attached model is the adapter's."""
    return "low_rank" in path or "embedding" in path.split(".")
