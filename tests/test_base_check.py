"""Proves that a fine-tune of an adapter's base is refused or warned of, in loading, training and resuming."""

from __future__ import annotations

import gc
import json
import logging
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx_lm.utils import load_model

from mtp_mlx import base_check
from mtp_mlx.adapter_folder import Header, read_header, write_header
from mtp_mlx.drafters.masks.folder import mask_header, save
from mtp_mlx.drafters.registry import load_folder
from mtp_mlx.errors import MTPError
from mtp_mlx.model.attach import attach
from mtp_mlx.model.fingerprint import base_fingerprint, sample_base, sampled_through
from mtp_mlx.planning.choose import recorded_acceptance
from tests.model.naive import random_adapter
from tests.model.test_base_sample import FORMATS, build, copy_of, tuned
from tests.tiny import save_tiny, tiny_model
from tests.train.training import trainer_for

CERTAIN = "though its norms are the same: a fine-tune was merged into them"


def written(folder: Path, model: nn.Module, **about: object) -> Path:
    adapter = random_adapter(model)
    facts = {"base_sample": sample_base(model), "acceptance": [0.5], **about}
    save(folder, adapter, mask_header(adapter.config, "tiny", base_fingerprint(model), **facts))
    return folder


def test_a_merged_fine_tune_is_refused(tmp_path: Path) -> None:
    model = build()
    folder = written(tmp_path / "adapter", model)
    load_folder(folder, model)
    with pytest.raises(MTPError, match=CERTAIN):
        load_folder(folder, tuned(model, 0.01))


def test_a_quantised_fine_tune_is_warned_of_and_a_quantised_base_is_not(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = build()
    folder = written(tmp_path / "adapter", model)
    for how in FORMATS.values():
        load_folder(folder, copy_of(model, **how))
    assert not caplog.records
    load_folder(folder, copy_of(tuned(model, 0.05), **FORMATS["4 bits"]))
    (record,) = caplog.records
    assert record.levelno == logging.WARNING and "by more than rounding explains" in record.message
    assert "(affine 4-bit, groups of 32, float32 scales)" in record.message and "(float32)" in record.message


def test_an_older_folder_loads_with_a_notice_told_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    base_check._tell_once.cache_clear()
    model = build()
    folder = written(tmp_path / "adapter", model, base_sample=None)
    assert "sample" not in json.loads((folder / "mtp_config.json").read_text())["base"]
    for _ in range(3):
        load_folder(folder, tuned(model, 0.05))
    assert [record.message for record in caplog.records] == [
        f"the adapter {folder} has an older fingerprint of its base, which does not notice a fine-tune merged into "
        "it: if drafts are rarely accepted, check that this is the model it was made for"
    ]


def test_layers_of_other_names_are_warned_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = build()
    folder = written(tmp_path / "adapter", model, base_sample=replace(sample_base(model), layers="0" * 8))
    load_folder(folder, model)
    (record,) = caplog.records
    assert "whose layers have other names or another number than this model's here" in record.message


def test_checking_a_lazy_model_leaves_its_layers_on_disk(tmp_path: Path) -> None:
    """So a process that will have a part of each layer never has whole ones in memory."""
    sizes = {"hidden_size": 256, "intermediate_size": 1024}
    save_tiny(tmp_path / "model", "llama", seed=3, **sizes)
    folder = written(tmp_path / "adapter", tiny_model("llama", seed=3, **sizes), acceptance=[])
    load = lambda: load_model(tmp_path / "model", lazy=True)[0]  # noqa: E731
    header, model = read_header(folder), load()
    gc.collect()
    before = mx.get_active_memory()
    with sampled_through(model, load):
        base_check.check_base(folder, header, model)
        assert sample_base(model) == header.base_sample
    gc.collect()
    assert mx.get_active_memory() - before < 100_000, "the norms alone"
    base_check.check_base(folder, header, model)
    assert mx.get_active_memory() - before > 4_000_000, "this proves nothing"
    other, tuned_folder = build(), written(tmp_path / "other", tuned(build(), 0.05))
    with sampled_through(other, build), pytest.raises(MTPError, match=CERTAIN):
        load_folder(tuned_folder, other)


def test_a_damaged_sample_is_one_sentence(tmp_path: Path) -> None:
    folder = written(tmp_path / "adapter", build())
    raw = json.loads((folder / "mtp_config.json").read_text())
    raw["base"]["sample"]["weights"] = "???"
    (folder / "mtp_config.json").write_text(json.dumps(raw))
    with pytest.raises(MTPError, match="is damaged: the base's sampled weights are not base64"):
        read_header(folder)


# --- training -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["mask-tokens", "mtp-heads"])
def test_training_starts_and_resumes_on_the_same_base_only(tmp_path: Path, method: str) -> None:
    model, changes = build(), {"method": method, "steps": 2, "warmup": 0}
    assert trainer_for(tmp_path / "a", model=build(), **changes).run()
    header = read_header(tmp_path / "a")
    assert header.base_sample == sample_base(model)
    again = trainer_for(tmp_path / "a", model=copy_of(model, **FORMATS["8 bits"]), **changes)
    assert again.resume(), "the precision may change"
    with pytest.raises(MTPError, match="the base model's weights changed by more than rounding"):
        trainer_for(tmp_path / "a", model=tuned(model, 0.02), **changes).resume()
    with pytest.raises(MTPError, match=CERTAIN):
        trainer_for(tmp_path / "b", model=tuned(model, 0.02), start_from=tmp_path / "a", **changes)


@pytest.mark.parametrize("method", ["mask-tokens", "ptp", "conf-adapt", "mtp-heads"])
def test_acceptance_is_recorded_for_the_precision_of_the_base(tmp_path: Path, method: str) -> None:
    model = copy_of(build(), **FORMATS["4 bits"])
    trainer = trainer_for(tmp_path / "a", model=model, method=method, steps=2, warmup=0)
    assert trainer.run()
    header = read_header(tmp_path / "a")
    assert header.acceptance_by_precision == {"4-bit": header.acceptance} and header.acceptance
    assert header.training["base_precision"] == "4-bit"
    assert "(base in 4-bit)" in (tmp_path / "a" / "README.md").read_text()


def test_the_prior_is_the_acceptance_of_the_nearest_precision(tmp_path: Path) -> None:
    model = build()
    folder = written(tmp_path / "adapter", model, acceptance=[0.9])
    header = read_header(folder)
    known = {"float32": [0.5, 0.25], "4-bit": [0.375]}
    write_header(folder, replace(header, acceptance_by_precision=known))

    def prior(base: nn.Module, info: Header | None = None) -> list[float]:
        source, found = load_folder(folder, base)
        attached = attach(base, source)
        attached.info = found if info is None else info
        acceptance = recorded_acceptance(attached)
        attached.detach()
        return acceptance

    assert read_header(folder).acceptance_by_precision == known
    assert prior(model) == [0.5, 0.25] and prior(copy_of(model, **FORMATS["4 bits"])) == [0.375]
    assert prior(copy_of(model, **FORMATS["8 bits"])) == [0.375], "a factor of two from 4 bits, four from 32"
    assert prior(model, info=header) == [0.9], "an older folder has one list"
