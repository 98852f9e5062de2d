"""Trained on a toy language in the test run, both PTP variants decode at least twice the tokens per step of slots
that know nothing of each other, at temperature 1; and inverse-autoregressive training needs no teacher."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import mlx.optimizers as optim
import numpy as np
import pytest

from mtp_mlx.decode.loop import mtp_generate_step
from mtp_mlx.decode.pick import SamplingConfig
from mtp_mlx.decode.policy import FixedPolicy
from mtp_mlx.decode.stats import DecodeStats
from mtp_mlx.drafters.ptp.config import PTPConfig
from mtp_mlx.drafters.ptp.inverse_ar import InverseAR, inverse_ar_losses
from mtp_mlx.drafters.ptp.options import PTPSettings
from mtp_mlx.drafters.ptp.weights import new_ptp_adapter
from mtp_mlx.model.attach import AttachedModel, attach
from tests.drafters.ptp import toy_language as toy
from tests.train.training import Remembering, make_trainer

SLOTS = 4
STEPS = 150
LOSSES = {"o": "ce", "c": "kl"}


def trained(folder: Path, variant: str, independent: bool, seed: int = 0) -> AttachedModel:
    """The teacher with an adapter that `Trainer` has trained."""
    settings = PTPSettings(
        data=folder / "data.jsonl",
        out=folder / "adapter",
        variant=variant,  # type: ignore[arg-type]
        independent=independent,
        slots=SLOTS,
        rank=16,
        alpha=32.0,
        draft_vocab=0,
        steps=STEPS,
        ptp_loss=LOSSES[variant],  # type: ignore[arg-type]
        warmup=10,
        batch_size=12,
        micro_batches=1,
        block_share=0.6,
        u_beta=1.0,
        learning_rate=5e-3,
        schedule="linear",
        measure_every=0,
        save_every=10_000,
        seed=seed,
    )
    trainer = make_trainer(toy.teacher(), toy.examples(512, 1 + seed), [], settings, Remembering())
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


WORDS, VOCABULARY = 3, 6
TRAINING_STEPS, AVERAGED = 220, 40


def inverse_ar(seed: int) -> tuple[InverseAR, float, float]:
    """(a model trained from data alone, its slots' perplexity before and after)."""
    texts = toy.texts_of_words(WORDS)
    model = toy.toy_model(VOCABULARY, seed)
    student = attach(model, new_ptp_adapter(model, PTPConfig(variant="c", slots=2, rank=4, alpha=4.0)))
    training = InverseAR(student, slots=2, anchors=2 * WORDS, seed=seed)
    before = training.perplexity(texts)
    optimizer, average = toy.optimizer_for_toys(), toy.Average(model)
    for step in range(TRAINING_STEPS):
        optimizer.learning_rate = toy.rate_at(step, TRAINING_STEPS, 5e-3, power=1.5)
        _, gradients = training(np.concatenate([texts, texts]), step)
        optimizer.update(model, optim.clip_grad_norm(gradients, 1.0)[0])
        mx.eval(model.parameters(), optimizer.state)
        if step >= TRAINING_STEPS - AVERAGED:
            average.add()
    average.put()
    return training, before, training.perplexity(np.concatenate([texts] * 8))


def test_inverse_autoregressive_training_reaches_the_teachers_perplexity() -> None:
    """From data alone, with uniforms of its own: within 2 % of a model that sees every token before.

    The model starts untrained, so no teacher has any part in it. Slots that know nothing of each other could not do
    better than 1.41 times the teacher's perplexity: half of them stand before a second half.
    """
    texts = toy.texts_of_words(WORDS)
    teacher = toy.toy_model(VOCABULARY)
    toy.train_ar(teacher, 60, texts)
    reached = toy.perplexity(teacher, texts)
    assert reached < 1.002 * 2
    training, before, after = inverse_ar(seed=3)
    print(f"perplexity: teacher {reached:.4f}, slots {before:.3f} before and {after:.4f} after training")
    assert before > 1.4 * reached and after < 1.02 * reached
    assert toy.perplexity(training.attached.model, texts) < 1.02 * reached, (
        "real rows predict the next token too"
    )
    layout = training.layout(texts.shape[1], 0)
    foreign = mx.random.uniform(shape=(len(texts), len(layout.slot_positions)))
    _, blind = inverse_ar_losses(training.attached, layout, mx.array(texts), foreign)
    assert np.exp(np.mean(np.array(blind))) > 1.4 * reached, "uniforms of other texts must not do"
