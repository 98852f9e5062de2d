"""Proves that a prompt cache of another model, and groups that do not fit the heads, are refused before any pass."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from click.testing import CliRunner
from mlx_lm.generate import generate_step
from mlx_lm.models.cache import make_prompt_cache

import mtp_mlx.cli as cli
from mtp_mlx.cli.serve import ServeSettings, application
from mtp_mlx.decode.loop import mtp_generate_step
from mtp_mlx.errors import MTPError
from mtp_mlx.model.attach import attach
from tests.decode.fakes import attached
from tests.tiny import SPECIFIC, WINDOWED, _module, save_tiny, tiny_model

PROMPT = [5, 9, 14, 3, 77]


def filled(**overrides: Any) -> list[Any]:
    """mlx-lm's cache of a text, made by a model of this shape."""
    model = tiny_model("llama", seed=3, **overrides)
    cache = make_prompt_cache(model)
    list(generate_step(mx.array(PROMPT), model, max_tokens=2, prompt_cache=cache))
    return cache


@pytest.mark.parametrize(
    ("cache", "message"),
    [
        (lambda: [], "has 0 layers and this model 2"),
        (lambda: filled(num_hidden_layers=3), "has 3 layers and this model 2"),
        (
            lambda: filled(num_key_value_heads=4),
            "layer 0 of `prompt_cache` holds 4 heads of 16 and 16 numbers",
        ),
        (lambda: filled(head_dim=32), "holds 2 heads of 32 and 32 numbers, this model 2 heads of 16"),
        (
            lambda: [layer.to_quantized(group_size=32, bits=4) for layer in filled(head_dim=32)],
            "holds 2 heads of 32 and 32",
        ),
    ],
    ids=["empty", "layers", "heads", "head size", "quantised"],
)
def test_a_prompt_cache_of_another_model(cache: Any, message: str) -> None:
    with pytest.raises(MTPError, match=message):
        next(mtp_generate_step(PROMPT, attached("llama"), prompt_cache=cache()))


def test_a_prompt_cache_of_this_model_is_taken() -> None:
    assert next(mtp_generate_step([8], attached("llama"), prompt_cache=filled())).token >= 0


@pytest.mark.parametrize(
    ("head_dim", "group", "remedy"),
    [
        (16, 64, "leave `kv_bits` out"),
        (32, 64, "use `kv_group_size` 32"),
        (64, 128, "use `kv_group_size` 64"),
    ],
)
def test_groups_that_do_not_fit_the_heads(head_dim: int, group: int, remedy: str) -> None:
    """Refused although quantising would start only after 5000 tokens."""
    model = attach(tiny_model("llama", seed=3, head_dim=head_dim), None)
    with pytest.raises(
        MTPError, match=f"{head_dim} numbers cannot be quantised in groups of {group}: {remedy}"
    ):
        next(mtp_generate_step(PROMPT, model, kv_bits=4, kv_group_size=group))
    if head_dim == 64:
        assert next(mtp_generate_step(PROMPT, model, kv_bits=4, kv_group_size=64)).token >= 0


def widened(name: str) -> Any:
    """A tiny model whose heads can be quantised in groups of 32, if its head size is an option."""
    sizes = {"hidden_size": 64, "head_dim": 32, "v_head_dim": 32, "kv_lora_rank": 32, "qk_rope_head_dim": 32}
    known = {one.name for one in dataclasses.fields(_module(name).ModelArgs)}
    try:
        model = tiny_model(name, seed=3, **{key: size for key, size in sizes.items() if key in known})
        model(mx.array([[1]]))
    except ValueError:  # its other sizes do not follow these
        model = tiny_model(name, seed=3)
    return model


@pytest.mark.parametrize("name", [name for name in SPECIFIC if name not in WINDOWED])
def test_a_quantised_cache_works_or_is_refused_at_the_start(name: str) -> None:
    """In one sentence, and not with an exception of the model's own attention in the middle of a text."""
    try:
        model = attach(widened(name), None)
        steps = mtp_generate_step(
            PROMPT, model, max_tokens=6, kv_bits=8, kv_group_size=32, quantized_kv_start=6
        )
        assert len([item.token for item in steps]) == 6
    except MTPError as error:
        assert "quantised" in str(error) or "cannot be used here" in str(error) or "no seam" in str(error)
    except RuntimeError as error:
        if "No Metal back-end" not in str(error):
            raise
        pytest.skip("mlx-lm runs this architecture on Metal only")


def test_attention_that_cannot_read_a_quantised_cache_is_refused() -> None:
    """gemma2 computes its scores itself."""
    model = attach(tiny_model("gemma2", seed=3, head_dim=32), None)
    with pytest.raises(MTPError, match="attention cannot read quantised keys.*leave `kv_bits` out"):
        next(mtp_generate_step(PROMPT, model, kv_bits=8, kv_group_size=32))


@pytest.mark.parametrize("verb", ["generate", "serve"])
def test_verbs_refuse_them_at_the_start(tmp_path: Path, verb: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MTP_MLX_CACHE", str(tmp_path / "cache"))
    model = save_tiny(tmp_path / "model", "llama", head_dim=32)
    more = {"generate": ["-p", "x"], "serve": ["--port", "0"]}[verb]
    result = CliRunner().invoke(
        cli.main, [verb, "-m", str(model), "--layout", "plain", "--kv-bits", "4", *more]
    )
    assert result.exit_code == 2 and "use --kv-group-size 32" in result.stderr, result.output


def test_serve_refuses_to_quantise_sliding_windows_at_the_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Although groups of 32 fit the heads; before, every request failed instead."""
    monkeypatch.setenv("MTP_MLX_CACHE", str(tmp_path / "cache"))
    model = save_tiny(tmp_path / "model", "gemma3_text", head_dim=32)
    settings = ServeSettings(model=str(model), layout="plain", kv_bits=4, kv_group_size=32)
    with pytest.raises(MTPError, match="sliding-window layers, whose cache cannot be quantised"):
        application(settings, None)
