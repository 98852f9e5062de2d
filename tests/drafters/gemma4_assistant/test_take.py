"""Proves that an assistant's checkpoint is taken over whole, from a folder or the hub, or refused in one sentence."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from click.testing import CliRunner, Result

from mtp_mlx import adapter_sources, hub, load
from mtp_mlx.cli import main
from mtp_mlx.convert.heads import take
from mtp_mlx.drafters.gemma4_assistant import measure
from mtp_mlx.drafters.gemma4_assistant.measure import Measured
from mtp_mlx.drafters.gemma4_assistant.source import Gemma4Assistant
from mtp_mlx.errors import MTPError
from tests.drafters.gemma4_assistant.assistants import CONFIG, TARGET, A, Arrays, assistant_folder, tensors
from tests.stand_in_hub import StandIn
from tests.tiny import save_tiny


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("gemma") / "model", "gemma4_text", seed=3, **TARGET)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A random assistant is hardly ever right; what that means is measured in one test only."""
    monkeypatch.setenv("MTP_MLX_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(take, "LEAST", 0.0)
    monkeypatch.setattr(take, "TOKENS", 6)
    monkeypatch.setattr(adapter_sources, "_PROMPTS", 1)
    return tmp_path / "cache" / "heads"


def run(*words: str | Path) -> Result:
    return CliRunner().invoke(main, [str(word) for word in words])


def test_it_is_kept_as_an_adapter_of_the_model(model: Path, cache: Path, tmp_path: Path) -> None:
    """With the copy of its embedding that some files have, and under the model type of the larger models."""
    made = tensors(centroids=True)
    copy = {"lm_head.weight": made["model.embed_tokens.weight"]}
    kind = {"model_type": "gemma4_unified_assistant"}
    attached, _ = load(str(model), heads=assistant_folder(tmp_path / "assistant", made | copy, **kind))
    assert isinstance(attached.speculator, Gemma4Assistant) and attached.info.method == "gemma4-assistant"
    assert attached.info.acceptance == attached.info.acceptance_by_precision["float32"]
    kept = next(path for path in cache.iterdir() if not path.name.startswith("."))
    stored = mx.load(str(kept / "mtp.safetensors"))
    assert stored.keys() == made.keys()
    assert all(np.array_equal(np.array(stored[name]), value) for name, value in made.items())
    shown = json.loads(run("info", kept, "--json").stdout)
    assert (shown["method"], shown["layers"], shown["width"]) == ("gemma4-assistant", 4, A)
    assert "5 of 16 clusters" in (kept / "README.md").read_text()


@pytest.mark.parametrize(("from_token", "kept"), [([0.8, 0.5], "token"), ([0.55, 0.5], "state")])
def test_the_position_is_found_and_kept(
    model: Path, tmp_path: Path, from_token: list[float], kept: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The one from which clearly more drafts are right; else that of most runtimes."""
    found = {"state": [0.5, 0.5], "token": from_token}

    def measured(_: Any, source: Gemma4Assistant, *rest: Any) -> Measured:
        return Measured(found[source.config.position], 40, "float32")

    monkeypatch.setattr(measure, "_measure", measured)
    source = assistant_folder(tmp_path / "assistant", tensors())
    for _ in range(2):  # measured, and as kept
        attached, _ = load(str(model), heads=source)
        assert attached.speculator.config.position == kept == attached.info.own["assistant"]["position"]
    assert attached.info.acceptance == found[kept] and attached.info.measurements["positions"] == found


def test_a_quantised_one_runs_quantised(model: Path, tmp_path: Path) -> None:
    made = tensors()
    for name in ("model.embed_tokens", "pre_projection", "model.layers.3.self_attn.q_proj"):
        parts = mx.quantize(mx.array(made[f"{name}.weight"]), group_size=32, bits=8)
        kinds = zip(("weight", "scales", "biases"), parts, strict=True)
        made |= {f"{name}.{kind}": np.array(part) for kind, part in kinds}
    attached, _ = load(str(model), heads=assistant_folder(tmp_path / "assistant", made))
    assistant = attached.speculator.assistant
    assert assistant.pre_projection.bits == assistant.model.embed_tokens.bits == 8
    assert "scales" not in assistant.post_projection


def test_it_is_fetched_from_the_hub(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in = StandIn(tmp_path / "hub")
    monkeypatch.setattr(hub, "hub_api", lambda: stand_in)
    folder = assistant_folder(stand_in.remote / "maker" / "assistant", tensors())
    (folder / "tokenizer.json").write_text("{}")
    assert isinstance(load(str(model), heads="maker/assistant")[0].speculator, Gemma4Assistant)
    assert sorted(stand_in.fetched) == ["config.json", "model.safetensors"]


def without(name: str) -> Arrays:
    return {key: value for key, value in tensors().items() if key != name}


TEXT: dict[str, Any] = CONFIG["text_config"]
MISFITS: dict[str, tuple[dict[str, Any], Arrays, str]] = {
    "width": ({"backbone_hidden_size": 64}, tensors(), "is for a model of width 64, and this model's is 48"),
    "vocabulary": (
        {"text_config": {**TEXT, "vocab_size": 320}},
        tensors(),
        "knows 320 tokens, and this model 160",
    ),
    "heads": (
        {"text_config": {**TEXT, "global_head_dim": 32}},
        tensors(),
        "4 heads of 32 numbers for full_attention, which do not go with this model's 1 of 24",
    ),
    "tensors": ({}, without("post_projection.weight"), r"missing post_projection.weight \[48, 32\]"),
    "more tensors": ({}, {**tensors(), "x": np.zeros(3)}, r"unexpected x \[3\]"),
    "no assistant": (
        {"text_config": {**TEXT, "hidden_size_per_layer_input": 8}},
        tensors(),
        "which assistants do not",
    ),
    "no layers": ({"text_config": {**TEXT, "layer_types": None}}, tensors(), "its layer_types are None"),
    "clusters": (
        {"num_centroids": 7, "use_ordered_embeddings": True},
        tensors(),
        "160 cannot be divided among 7",
    ),
}


@pytest.mark.parametrize("name", MISFITS)
def test_one_that_does_not_fit_is_refused(model: Path, cache: Path, tmp_path: Path, name: str) -> None:
    changes, made, words = MISFITS[name]
    with pytest.raises(MTPError, match=words) as error:
        load(str(model), heads=assistant_folder(tmp_path / "assistant", made, **changes))
    assert "\n" not in str(error.value)
    assert not cache.exists() or all(path.name.startswith(".") for path in cache.iterdir())


def test_an_order_that_is_damaged_is_refused(model: Path, tmp_path: Path) -> None:
    made = tensors(centroids=True)
    made["masked_embedding.token_ordering"][3] = 1 << 20
    with pytest.raises(MTPError, match="does not name every token once"):
        load(str(model), heads=assistant_folder(tmp_path / "assistant", made))


def test_a_useless_one_is_refused(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(take, "LEAST", 0.2)
    with pytest.raises(
        MTPError, match=r"or damaged: the first draft is right in \d+% of \d+ cases.*Tried, by depth: "
    ):
        load(str(model), heads=assistant_folder(tmp_path / "assistant", tensors()))


def test_where_it_does_not_belong(model: Path, tmp_path: Path) -> None:
    """In the place of a model or of a draft model, beside another family, or for conversion: what to do instead."""
    source = assistant_folder(tmp_path / "assistant", tensors())
    other = save_tiny(tmp_path / "llama", vocab_size=160)
    for words, said in (
        (("generate", "-m", source, "-p", "the"), "it is the assistant of a model: name it with --heads"),
        (("generate", "-m", model, "-p", "the", "--draft-model", source), "name it with --heads"),
        (("generate", "-m", other, "-p", "the", "--heads", source), "of the type 'llama': leave --heads out"),
        (("convert", source, tmp_path / "out"), "Gemma 4 assistant, which drafts as it is: name its folder"),
    ):
        result = run(*words)
        assert result.exit_code == 2 and said in result.stderr, result.stderr
    shown = json.loads(run("info", source, "--json").stdout)
    heads = shown["mtp heads"]
    assert shown["type"] == "gemma4_assistant" and heads["family"] == "Gemma 4 assistant"
    assert heads["width of its model"] == 48
