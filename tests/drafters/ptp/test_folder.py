"""PTP adapter folders: written, read and shown as they are, loaded for their base only; a training run of the method
ends in one, repeats itself after an interruption, and drafts; settings that do not go together are refused."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from click.testing import CliRunner

from mtp_mlx.adapter_folder import Header, read_header
from mtp_mlx.api import generate, load
from mtp_mlx.cli import main
from mtp_mlx.decode.loop import mtp_generate_step
from mtp_mlx.decode.pick import SamplingConfig
from mtp_mlx.decode.policy import FixedPolicy
from mtp_mlx.decode.stats import DecodeStats
from mtp_mlx.drafters.masks.folder import config_of as mask_config
from mtp_mlx.drafters.ptp.config import PTPConfig, TeacherSampling
from mtp_mlx.drafters.ptp.folder import config_of, ptp_header
from mtp_mlx.drafters.ptp.folder import save as save_ptp
from mtp_mlx.drafters.ptp.options import PTPSettings
from mtp_mlx.drafters.ptp.uniform_embedding import UNIFORM_EMBEDDINGS
from mtp_mlx.drafters.registry import load_folder
from mtp_mlx.errors import MTPError
from mtp_mlx.metal_kernels.inverse_cdf import inverse_cdf
from mtp_mlx.model.fingerprint import base_fingerprint
from tests.drafters.ptp.ptp_fakes import random_ptp_adapter
from tests.tiny import VOCABULARY, save_tiny, tiny_model
from tests.train.training import metrics, trainer_for

DRAFT_IDS = mx.array(list(range(5, 65)), dtype=mx.int32)


def written(folder: Path, architecture: str = "llama", **config: Any) -> tuple[Any, Header]:
    model = tiny_model(architecture, seed=3)
    adapter = random_ptp_adapter(model, draft_ids=DRAFT_IDS, draft_vocab_size=60, **config)
    info = ptp_header(
        adapter.config, "tiny", base_fingerprint(model), training={"steps": 3}, acceptance=[0.5, 0.25]
    )
    save_ptp(folder, adapter, info, mx.float32)
    return adapter, info


@pytest.mark.parametrize("embedding", UNIFORM_EMBEDDINGS)
@pytest.mark.parametrize("variant", ["o", "c"])
def test_round_trip(tmp_path: Path, variant: str, embedding: str) -> None:
    teacher = TeacherSampling(0.7, 50, 0.95, 0.01)
    adapter, info = written(tmp_path / "a", variant=variant, embedding=embedding, knots=5, teacher=teacher)
    loaded, found = load_folder(tmp_path / "a", tiny_model("llama", seed=3))
    assert found == info and loaded.config == adapter.config
    before, after = adapter.tensors(), loaded.tensors()
    assert before.keys() == after.keys() and all(mx.array_equal(before[name], after[name]) for name in before)


def test_another_base_and_other_methods_are_refused(tmp_path: Path) -> None:
    written(tmp_path / "a")
    with pytest.raises(MTPError, match="fingerprint"):
        load_folder(tmp_path / "a", tiny_model("qwen3", seed=3))
    with pytest.raises(MTPError, match="method 'ptp', not 'mask-tokens'"):
        mask_config(tmp_path / "a", read_header(tmp_path / "a"))
    config = json.loads((tmp_path / "a" / "mtp_config.json").read_text())
    for key, value, message in (
        ("variant", "x", "`variant` is 'x'"),
        ("slots", 0, "`slots` must be at least 1"),
        ("teacher", 3, ""),
    ):
        spoilt = {**config, "adapter": {**config["adapter"], key: value}}
        (tmp_path / "a" / "mtp_config.json").write_text(json.dumps(spoilt))
        with pytest.raises(MTPError, match=message or "damaged"):
            config_of(tmp_path / "a", read_header(tmp_path / "a"))


def test_load_generate_and_info(tmp_path: Path) -> None:
    """Through the package's own calls: the text is plain decoding's, and the folder says what it is."""
    base = save_tiny(tmp_path / "base", "llama", seed=3)
    written(tmp_path / "a", variant="o")
    model, tokenizer = load(str(base), tmp_path / "a")
    hot = SamplingConfig(temperature=0.8, seed=6)
    texts = {
        layout: generate(model, tokenizer, "The sky", 16, sampling=hot, layout=layout)
        for layout in ("plain", "linear", "quadratic")
    }
    alone, _ = load(str(base), None)
    texts["alone"] = generate(
        alone,
        tokenizer,
        "The sky",
        16,
        sampling=dataclasses.replace(hot, noise="inverse-cdf"),
        layout="plain",
    )
    assert len(set(texts.values())) == 1
    shown = json.loads(CliRunner().invoke(main, ["info", str(tmp_path / "a"), "--json"]).output)
    assert shown["method"] == "ptp" and shown["shape"]["variant"] == "o"
    assert "Parallel Token Prediction" in (tmp_path / "a" / "README.md").read_text()


def test_another_sampling_than_the_teachers_is_told_once() -> None:
    from mtp_mlx.model.attach import attach

    model = tiny_model("llama", seed=3)
    adapter = random_ptp_adapter(model, variant="c", teacher=TeacherSampling(0.7, 50))
    attached = attach(model, adapter)

    def told(**sampling: Any) -> dict[str, int]:
        stats = DecodeStats()
        config, policy = SamplingConfig(**sampling), FixedPolicy("linear", 2)
        list(mtp_generate_step([3, 4], attached, max_tokens=6, sampling=config, policy=policy, stats=stats))
        return stats.fallbacks

    (reason,) = told(temperature=0.9, top_k=50)
    assert "temperature 0.7" in reason and "top_k" not in reason
    assert not told(temperature=0.7, top_k=50) and not told(temperature=0.0)


RUN = {"method": "ptp", "steps": 6, "save_every": 2, "measure_every": 3, "warmup": 2, "max_blocks": 3}


@pytest.mark.parametrize(("variant", "uniforms"), [("o", "teacher"), ("c", "teacher"), ("c", "own")])
def test_a_stopped_run_goes_on_as_if_it_had_not_been(tmp_path: Path, variant: str, uniforms: str) -> None:
    """Losses, measurements and the adapter of an interrupted run equal those of one that was not."""
    settings = {**RUN, "variant": variant, "uniforms": uniforms, "greedy_share": 0.3}
    settings |= {"draft_vocab": 0} if variant == "c" else {}
    whole = trainer_for(tmp_path / "whole", **settings)
    assert whole.run()
    first = trainer_for(tmp_path / "parts", **settings)
    for _ in range(4):
        first._one_step()
    first.save()
    second = trainer_for(tmp_path / "parts", **settings)
    assert second.resume() and second.step == 4
    assert second.run()
    losses = [
        [row["loss"] for row in metrics(tmp_path / name) if "loss" in row] for name in ("whole", "parts")
    ]
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-5)
    mine, theirs = whole.adapter.tensors(), second.adapter.tensors()
    assert all(np.allclose(mine[name], theirs[name], atol=1e-5) for name in mine)
    adapter, info = load_folder(tmp_path / "parts", tiny_model("qwen3", seed=3))
    assert adapter.config.variant == variant and info.training["steps"] == 6
    assert adapter.config.teacher == TeacherSampling()


@pytest.mark.parametrize(
    "changes", [{"ptp_loss": "kl"}, {"ptp_loss": "reverse-kl"}, {"uniforms": "own"}], ids=str
)
def test_losses_of_distributions_go_down(tmp_path: Path, changes: dict[str, str]) -> None:
    """C-PTP's divergences on one batch of text that the base may have written; and inverse-AR training."""
    trainer = trainer_for(
        tmp_path / "a",
        **{**RUN, "variant": "c", "draft_vocab": 0, "learning_rate": 1e-2, "steps": 12, **changes},
    )
    trainer.run()
    losses = [row["loss"] for row in metrics(tmp_path / "a") if "loss" in row]
    assert np.mean(losses[-3:]) < np.mean(losses[:3])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"variant": "o", "ptp_loss": "kl"}, "compares distributions, and `variant` o predicts tokens"),
        ({"uniforms": "own"}, "`uniforms` own needs a distribution per slot"),
        ({"variant": "c", "uniforms": "own", "ptp_loss": "kl"}, "`uniforms` own has no teacher"),
        ({"variant": "c", "uniforms": "own", "u_beta": 1.0}, "leave `u_beta` out"),
        ({"variant": "c", "uniforms": "own", "independent": True}, "leave `uniforms` out"),
        ({"block_share": 0.0}, "leaves no block to train on"),
        ({"variant": "c", "draft_vocab": 8192}, "a draft vocabulary would shift: set `draft_vocab` to 0"),
    ],
)
def test_settings_that_do_not_go_together(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(MTPError, match=message):
        PTPSettings(data=tmp_path / "d", out=tmp_path / "o", **changes)


def test_c_ptp_drafts_from_all_ids(tmp_path: Path) -> None:
    """By default: by the CDF over fewer ids, even slots that know the model pick other tokens than it picks."""
    paths = {"data": tmp_path / "d", "out": tmp_path / "o"}
    assert PTPSettings(**paths, variant="c").draft_vocab == 0
    assert PTPSettings(**paths).draft_vocab == PTPSettings(**paths, variant="o").draft_vocab == 8192
    logits = mx.random.normal((500, VOCABULARY), key=mx.random.key(0)) * 2
    uniforms = mx.random.uniform(shape=(500,), key=mx.random.key(1))
    drafted = mx.argsort(-logits.mean(axis=0))[: VOCABULARY // 2]
    drafted = mx.sort(drafted)
    whole = inverse_cdf(logits, uniforms)
    part = drafted[inverse_cdf(logits[:, drafted], uniforms)]
    mass = mx.softmax(logits, axis=-1)[:, drafted].sum(axis=-1).mean()
    assert float((whole == part).mean()) < 0.7 * float(mass), "far below what could be drafted"


def test_an_old_c_ptp_adapter_with_a_draft_vocabulary_loads_and_is_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    written(tmp_path / "c", variant="c")
    written(tmp_path / "o", variant="o")
    loaded, _ = load_folder(tmp_path / "o", tiny_model("llama", seed=3))
    assert "C-PTP" not in caplog.text
    loaded, _ = load_folder(tmp_path / "c", tiny_model("llama", seed=3))
    assert loaded.draft_ids is not None and "this C-PTP adapter drafts from 60 ids" in caplog.text


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"variant": "c", "draft_vocab": 0}, "variant o, these settings say c"),
        ({"u_embedding": "ieee-bits"}, "embedding bits, "),
    ],
)
def test_start_from_weights_of_another_meaning_is_refused(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    written(tmp_path / "o", "qwen3", variant="o", slots=3)
    with pytest.raises(MTPError, match=message):
        trainer_for(tmp_path / "new", **{**RUN, **changes, "start_from": tmp_path / "o"})


def test_config_refuses_values_out_of_range() -> None:
    assert PTPConfig(variant="o").lead == 1 and PTPConfig(variant="c").lead == 0
    with pytest.raises(MTPError, match="`embedding` is 'round'"):
        PTPConfig(embedding="round")  # type: ignore[arg-type]
    assert VOCABULARY > 65
