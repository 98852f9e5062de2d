"""`train conf-adapt` learns, resumes exactly, and writes what `load` and both ways of emission can use."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest import mock

import mlx.core as mx
import mlx.nn as nn
import mlx_lm
import numpy as np
import pytest
from mlx_lm.generate import generate_step

import mtp_mlx
from mtp_mlx.decode.emission import Emission
from mtp_mlx.drafters.masks.options import ConfAdaptSettings
from mtp_mlx.errors import MTPError
from mtp_mlx.model.block import Block
from mtp_mlx.train.trainer import Trainer
from tests.tiny import save_tiny, tiny_model
from tests.train.training import Remembering, examples, make_trainer, metrics

PROMPT = [3, 1, 4, 1, 5]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("base") / "model", "qwen3", seed=3)


def settings_for(base: Path, out: Path, tuning: str, **changes: Any) -> ConfAdaptSettings:
    values: dict[str, Any] = {
        "model": str(base),
        "data": out.with_name("data.jsonl"),
        "out": out,
        "tuning": tuning,
        "slots": 3,
        "region_rows": 8,
        "steps": 8,
        "warmup": 2,
        "schedule": "constant",
        "draft_vocab": 60 if tuning == "gated-lora" else 0,
        "measure_every": 0,
        "save_every": 3,
        "learning_rate": 1e-3 if tuning == "full" else 1e-2,
    }
    if tuning != "full":
        values |= {"rank": 4, "alpha": 8.0}
    return ConfAdaptSettings(**{**values, **changes})


def trainer_for(base: Path, out: Path, tuning: str, **changes: Any) -> Trainer:
    rows, model = examples(), mlx_lm.load(str(base))[0]
    return make_trainer(
        model, rows[:10], rows[10:], settings_for(base, out, tuning, **changes), Remembering()
    )


@pytest.mark.parametrize("tuning", ["gated-lora", "lora", "full"])
def test_trains_exports_loads_and_decodes(base: Path, tmp_path: Path, tuning: str) -> None:
    trainer = trainer_for(base, tmp_path / "out", tuning, steps=24)
    assert trainer.run()
    losses = [row["loss"] for row in metrics(tmp_path / "out") if "loss" in row]
    assert np.mean(losses[-6:]) < 0.9 * np.mean(losses[:6])
    if tuning == "gated-lora":
        model, tokenizer = mtp_mlx.load(str(base), tmp_path / "out")
        untouched = tiny_model("qwen3", seed=3)
    else:
        model, tokenizer = mtp_mlx.load(str(tmp_path / "out"))
        untouched = mlx_lm.load(str(tmp_path / "out"))[0]
        changed = untouched.model.layers[0].self_attn.q_proj.weight
        assert not mx.allclose(changed, tiny_model("qwen3", seed=3).model.layers[0].self_attn.q_proj.weight)
    assert model.speculator is not None and model.speculator.config.shared_mask and model.most_drafts == 3
    trained = (
        trainer.adapter.model.embed_tokens.slots if tuning == "full" else trainer.adapter.slot_embeddings
    )
    assert mx.allclose(model.speculator.slot_embeddings.weight, trained.weight, atol=1e-2)
    plain = [t for t, _ in generate_step(mx.array(PROMPT), untouched, max_tokens=20)]
    for emit in (Emission(), Emission("verified", 0.1), Emission("conf-adapt", 1.0)):
        found = mtp_mlx.stream_generate(model, tokenizer, PROMPT, 20, layout="linear", emission=emit, slots=2)
        tokens = [response.token for response in found]
        assert tokens == plain[: len(tokens)]
    lossy = list(mtp_mlx.stream_generate(model, tokenizer, PROMPT, 9, emission=Emission("static")))
    assert not lossy[-1].lossless and lossy[-1].stats.steps <= -(-len(lossy) // 4)


@pytest.mark.parametrize("tuning", ["lora", "full"])
def test_the_exported_model_is_the_trained_one(base: Path, tmp_path: Path, tuning: str) -> None:
    """LoRA merged into the weights, or the weights themselves: the same logits, masks included."""
    trainer = trainer_for(
        base, tmp_path / "out", tuning, **({"learning_rate": 0.1} if tuning == "lora" else {})
    )
    assert trainer.run()
    model = mtp_mlx.load(str(tmp_path / "out"))[0]
    vocab = model.vocab_size
    block = Block(ids=mx.array([[*PROMPT, vocab, vocab + 1]]), n_real=0)
    own = trainer.attached
    expected = own.head(own.forward(block, own.make_cache()))
    found = model.head(model.forward(block, model.make_cache()))
    assert mx.abs(expected - found).max().item() < 1e-3
    real = Block.real(mx.array([PROMPT]))
    exported = model.head(model.forward(real, model.make_cache()))
    seen: list[mx.array] = []

    def spy(attached: Any, *_: Any) -> Any:
        seen.append(attached.head(attached.forward(real, attached.make_cache())))

    with mock.patch("mtp_mlx.drafters.masks.conf_adapt.measure_agreement", spy):
        trainer.method.measure([])
    assert mx.abs(seen[0] - exported).max().item() < 1e-3, (
        "measured is the model that is written, not its base"
    )
    if tuning == "lora":
        closed = own.head(own.forward(real, own.make_cache()))
        assert mx.abs(closed - exported).max().item() > 0.1


@pytest.mark.parametrize("tuning", ["gated-lora", "full"])
def test_a_resumed_run_is_the_same_run(base: Path, tmp_path: Path, tuning: str) -> None:
    whole = trainer_for(base, tmp_path / "whole" / "out", tuning)
    assert whole.run()
    broken = trainer_for(base, tmp_path / "broken" / "out", tuning)
    broken.run = None  # type: ignore[method-assign, assignment]
    for _ in range(3):
        broken._one_step()
    broken.save()
    again = trainer_for(base, tmp_path / "broken" / "out", tuning)
    assert again.resume() and again.step == 3
    assert again.run()
    losses = [
        [r["loss"] for r in metrics(tmp_path / name / "out") if "loss" in r] for name in ("whole", "broken")
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_ground_truth_and_soft_teacher_can_be_chosen(base: Path, tmp_path: Path) -> None:
    runs = []
    for supervision in ("hard-teacher", "soft-teacher", "ground-truth"):
        trainer = trainer_for(base, tmp_path / supervision, "gated-lora", supervision=supervision, steps=2)
        assert trainer.run()
        runs.append(trainer.loss)
    assert len(set(runs)) == 3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"region_rows": 4}, "no room for 3 masks behind two tokens; 5 does"),
        ({"tuning": "lora", "draft_vocab": 60}, "set `draft_vocab` to 0"),
        ({"tuning": "full", "start_from": Path("adapter")}, "`start_from` continues adapters"),
        ({"slots": 7, "max_length": 8}, "`max_length` 8 is too short for a block of 7 slots"),
    ],
)
def test_settings_that_do_not_go_together(
    base: Path, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(MTPError, match=message):
        settings_for(base, tmp_path / "out", **{"tuning": "gated-lora", **changes})


def test_defaults_that_follow_from_other_settings(tmp_path: Path) -> None:
    """The paper's regions of 32 rows are for up to 16 tokens; models of their own predict all ids."""

    def made(**changes: Any) -> ConfAdaptSettings:
        return ConfAdaptSettings(data=tmp_path / "d", out=tmp_path / "o", **changes)

    assert made().region_rows == 10 and made(slots=15).region_rows == 32
    assert made(region_rows=32).region_rows == 32
    assert (
        made().draft_vocab == 8192 and made(tuning="lora").draft_vocab == made(tuning="full").draft_vocab == 0
    )


def test_quantised_weights_are_not_tuned(base: Path, tmp_path: Path) -> None:
    model = tiny_model("qwen3", seed=3, hidden_size=64, intermediate_size=96)
    nn.quantize(model, group_size=32, bits=4)
    with pytest.raises(MTPError, match="these are quantised"):
        make_trainer(model, examples()[:4], [], settings_for(base, tmp_path / "out", "full"), Remembering())


def test_start_from_another_adapter(base: Path, tmp_path: Path) -> None:
    first = trainer_for(base, tmp_path / "first", "gated-lora", steps=2)
    assert first.run()
    second = trainer_for(base, tmp_path / "second", "gated-lora", steps=2, start_from=tmp_path / "first")
    theirs, own = first.adapter.slot_embeddings.weight, second.adapter.slot_embeddings.weight
    assert mx.allclose(theirs, own, atol=1e-2)  # stored in bfloat16
