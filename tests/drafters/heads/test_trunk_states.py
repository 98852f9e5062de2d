"""Proves that hidden states on disk are those of the trunk, for every run its own; damage or a full disk is told."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from mtp_mlx.drafters.heads.trunk_states import CachedStates, ComputedStates, weights_key
from mtp_mlx.errors import MTPError
from mtp_mlx.train.data import Example
from tests.drafters.heads.test_method import heads_trainer
from tests.tiny import tiny_model
from tests.train.training import Remembering, examples


def test_cached_states_are_those_of_the_trunk(tmp_path: Path) -> None:
    listener = Remembering()
    cached = heads_trainer(tmp_path / "a", listener, hidden_cache=tmp_path / "cache", steps=4)
    assert "0 of 10 rows are there" in listener.messages[0] and "at most 0.0 MB" in listener.messages[0]
    assert cached.run()
    computed = heads_trainer(tmp_path / "b", other := Remembering(), steps=4)
    assert computed.run()
    for one, two in zip(cached.listener.steps, other.steps, strict=True):
        assert one.loss == pytest.approx(two.loss, rel=2e-3) and one.loss != two.loss  # rounded to 16 bits
    files = sorted((tmp_path / "cache").rglob("*.safetensors"))
    assert 10 <= len(files) <= 14 and cached.agreement is not None
    model = tiny_model("qwen3", seed=3)
    rows = examples()[:3]
    states = CachedStates(cached.attached, tmp_path / "cache")(rows)
    for row, own in zip(rows, states, strict=True):
        expected = np.array(model.model(mx.array([row.tokens]))[0])
        np.testing.assert_allclose(np.array(own[: len(row)]), expected, rtol=2e-3, atol=2e-3)
    assert states.dtype == mx.float16


def test_a_run_does_not_depend_on_which_states_were_cached(tmp_path: Path) -> None:
    """A second run over a warm cache, of which half was deleted, has the losses of the first, bit for bit."""
    first = heads_trainer(tmp_path / "a", Remembering(), hidden_cache=tmp_path / "cache", steps=4)
    assert first.run()
    for file in sorted((tmp_path / "cache").rglob("*.safetensors"))[::2]:
        file.unlink()
    second = heads_trainer(tmp_path / "b", Remembering(), hidden_cache=tmp_path / "cache", steps=4)
    assert second.run()
    assert [step.loss for step in first.listener.steps] == [step.loss for step in second.listener.steps]


def test_cached_states_of_another_precision_are_not_used() -> None:
    def key(change: Any, **settings: Any) -> str:
        model = tiny_model("qwen3", seed=3, hidden_size=64, intermediate_size=96, **settings)
        change(model)
        return weights_key(model)

    def fine_tuned(model: Any) -> None:
        model.layers[0].mlp.up_proj.weight = model.layers[0].mlp.up_proj.weight + 1e-3

    keys = [
        key(lambda _: None),
        key(lambda model: model.set_dtype(mx.bfloat16)),
        key(lambda model: nn.quantize(model, group_size=32, bits=8)),
        key(lambda model: nn.quantize(model, group_size=32, bits=4)),
        key(fine_tuned),
        key(lambda _: None, rope_theta=123.0),  # the same weights, read in another way
    ]
    assert len(set(keys)) == 6 and key(lambda _: None) == keys[0]


def test_a_damaged_cache_file_is_named(tmp_path: Path) -> None:
    trainer = heads_trainer(tmp_path / "a", hidden_cache=tmp_path / "cache")
    states = CachedStates(trainer.attached, tmp_path / "cache")
    row = examples()[0]
    states([row])
    content = states.path(row).read_bytes()
    states.path(row).write_bytes(content[:-10])
    with pytest.raises(MTPError, match=rf"{states.path(row).name} are damaged .*: delete the file"):
        states([row])
    other = Example([*row.tokens, 5], 1)
    shutil.copy(tmp_path / "cache" / states.path(row).parent.name / states.path(row).name, states.path(other))
    states.path(other).write_bytes(content)
    with pytest.raises(MTPError, match="damaged .shape"):
        states([other])


def test_a_disk_without_room_for_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: _Usage(100))
    with pytest.raises(
        MTPError, match=r"`hidden_cache` .*cache needs .* more, and its disk has .* left: use another"
    ):
        heads_trainer(tmp_path / "a", hidden_cache=tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


class _Usage:
    def __init__(self, free: int) -> None:
        self.free = free


def test_states_too_large_for_float16(tmp_path: Path) -> None:
    trainer = heads_trainer(tmp_path / "a")
    trainer.attached.model.model.norm.weight = trainer.attached.model.model.norm.weight * 1e5
    row = examples()[0]
    states = CachedStates(trainer.attached, tmp_path / "cache")([row])
    assert states.dtype == mx.bfloat16
    expected = ComputedStates(trainer.attached)([row])
    np.testing.assert_allclose(np.array(states.astype(mx.float32)), np.array(expected), rtol=1e-2)


def test_states_of_other_layers_are_other_files(tmp_path: Path) -> None:
    cache, row = tmp_path / "cache", examples()[0]
    folders = set()
    for taps in ("last", "1,last", "1,2,last"):
        attached = heads_trainer(tmp_path / "a", hidden_cache=cache, taps=taps).method.attached
        states = CachedStates(attached, cache)
        expected = attached.states_of(mx.array([row.tokens]))
        np.testing.assert_allclose(np.array(states([row])), np.array(expected), rtol=2e-3, atol=2e-3)
        folders.add(states.path(row).parent)
    assert len(folders) == 3


def test_a_file_without_the_normaliser_is_completed(tmp_path: Path) -> None:
    """Earlier versions cached states alone."""
    attached, row = heads_trainer(tmp_path / "a").method.attached, examples()[0]
    states = CachedStates(attached, tmp_path / "cache")
    _, whole = states.with_normaliser([row])
    assert whole is not None and whole.shape == (1, len(row))
    path = states.path(row)
    mx.save_safetensors(str(path), {"hidden": mx.load(str(path))["hidden"]})  # type: ignore[index]
    _, again = states.with_normaliser([row])
    assert again is not None and mx.array_equal(again, whole).item()
    assert set(mx.load(str(path))) == {"hidden", "normaliser"}
    logits = attached.model(mx.array([row.tokens]))[0]
    np.testing.assert_allclose(np.array(whole[0]), np.array(mx.logsumexp(logits, axis=-1)), rtol=1e-3)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_a_known_normaliser_changes_nothing(tmp_path: Path, temperature: float) -> None:
    """The losses with the cached one, and with its being computed in every step."""
    settings = {"steps": 3, "temperature": temperature, "hidden_cache": tmp_path / "cache"}
    first = heads_trainer(tmp_path / "a", one := Remembering(), **settings)
    assert first.run()
    second = heads_trainer(tmp_path / "b", other := Remembering(), **settings)
    states = second.method._states
    with_normaliser = states.with_normaliser
    states.with_normaliser = lambda examples: (with_normaliser(examples)[0], None)
    assert second.run()
    for known, computed in zip(one.steps, other.steps, strict=True):
        assert known.loss == pytest.approx(computed.loss, rel=1e-5)


def test_a_step_reads_every_file_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = {"steps": 2, "warmup": 0, "measure_every": 0, "hidden_cache": tmp_path / "cache"}
    assert heads_trainer(tmp_path / "a", **settings).run()
    trainer, read = heads_trainer(tmp_path / "b", **settings), []
    own = CachedStates._read

    def counted(states: CachedStates, path: Path, example: Example) -> Any:
        read.append(path)
        return own(states, path, example)

    monkeypatch.setattr(CachedStates, "_read", counted)
    trainer._one_step()
    shown = trainer.settings.batch_size * trainer.settings.micro_batches
    assert 0 < len(read) <= shown
