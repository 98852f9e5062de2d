"""Proves that heads in 8 bits come back, draft and can be trained on, and that `auto` keeps to the acceptance."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten

from mtp_mlx.adapter_folder import count_weights, read_header, read_tensors, tensor_sizes
from mtp_mlx.convert.heads.speculators import export_speculators
from mtp_mlx.decode.loop import mtp_generate_step
from mtp_mlx.decode.policy import ChainPolicy
from mtp_mlx.drafters.heads.dense import dequantise
from mtp_mlx.drafters.heads.mtp_head import block_like
from mtp_mlx.drafters.heads.stored import as_stored, in_8_bits, is_quantised
from mtp_mlx.drafters.registry import load_folder
from mtp_mlx.errors import MTPError
from mtp_mlx.model.attach import attach
from tests.drafters.heads.test_mtp_head import random_heads
from tests.drafters.heads.test_shape import check_drafts
from tests.tiny import tiny_model
from tests.train.training import Remembering, trainer_for

WIDE = {"hidden_size": 64, "intermediate_size": 128}


def model_of(architecture: str = "qwen3", bits: int = 0) -> nn.Module:
    model = tiny_model(architecture, seed=3, **WIDE)
    if bits:
        nn.quantize(model, group_size=64, bits=bits)
    return model


def train(out: Path, model: nn.Module | None = None, listener: Any = None, **changes: Any) -> Any:
    """A run of two steps."""
    changes = {"method": "mtp-heads", "heads": 2, "steps": 2, "warmup": 0, "measure_every": 0} | changes
    trainer = trainer_for(out, listener, model=model or model_of(), **changes)
    assert trainer.run()
    return trainer


def test_a_folder_in_8_bits_is_half_as_large_and_drafts(tmp_path: Path) -> None:
    train(tmp_path / "small", store="8bit")
    train(tmp_path / "whole")
    small, whole = read_tensors(tmp_path / "small"), read_tensors(tmp_path / "whole")
    sizes = [sum(value.nbytes for value in tensors.values()) for tensors in (small, whole)]
    assert 0.5 < sizes[0] / sizes[1] < 0.6
    assert (
        small["heads.1.fuse.weight"].dtype == mx.uint32 and small["heads.1.fuse.scales"].dtype == mx.bfloat16
    )
    assert tensor_sizes(small)["heads.1.fuse.weight"] == whole["heads.1.fuse.weight"].size
    counts = [count_weights(tensor_sizes(tensors)) for tensors in (small, whole)]
    assert counts[0] == counts[1], "scales are not weights"
    section = read_header(tmp_path / "small").own["heads"]
    assert section["quantization"] == {"group_size": 64, "bits": 8}
    assert "quantization" not in read_header(tmp_path / "whole").own["heads"]
    model = model_of()
    plain = [token.token for token in mtp_generate_step(mx.array([5, 9, 11]), attach(model), max_tokens=12)]
    attach(model)
    for name in ("small", "whole"):
        heads, _ = load_folder(tmp_path / name, model)
        assert is_quantised(heads) == (name == "small")
        attached = attach(model, heads)
        tokens = mtp_generate_step(mx.array([5, 9, 11]), attached, max_tokens=12, policy=ChainPolicy(2))
        assert [token.token for token in tokens] == plain
        attached.detach()


def test_bits_may_be_asked_for_by_their_number(tmp_path: Path) -> None:
    train(tmp_path / "small", quantize_out=8)
    assert is_quantised(load_folder(tmp_path / "small", model_of())[0])
    with pytest.raises(MTPError, match="`quantize_out` 8 is `store` 8bit, and `store` is bf16"):
        train(tmp_path / "other", quantize_out=8, store="bf16")


def test_heads_in_8_bits_draft_what_they_were_measured_to(tmp_path: Path) -> None:
    check_drafts(tmp_path / "small", model_of, store="8bit")
    assert is_quantised(load_folder(tmp_path / "small", model_of())[0])


@pytest.mark.parametrize("architecture", ["llama", "qwen3_moe"])
def test_training_goes_on_from_8_bits_and_stays_in_them(tmp_path: Path, architecture: str) -> None:
    model = model_of(architecture)
    train(tmp_path / "a", model=model_of(architecture), store="8bit")
    stored, _ = load_folder(tmp_path / "a", model)
    trainer = train(tmp_path / "b", model=model_of(architecture), start_from=tmp_path / "a", steps=1)
    assert all(value.dtype == mx.float32 for _, value in tree_flatten(trainer.method.heads.parameters()))
    again, _ = load_folder(tmp_path / "b", model)
    assert is_quantised(again)
    dequantise(stored), dequantise(again)
    one, two = stored.heads[0].fuse.weight, again.heads[0].fuse.weight
    assert not mx.array_equal(one, two) and mx.allclose(one, two, atol=0.05).item()
    train(tmp_path / "c", model=model_of(architecture), start_from=tmp_path / "a", steps=1, store="bf16")
    assert not is_quantised(load_folder(tmp_path / "c", model)[0])


def test_a_quantisation_that_is_not_known_is_refused() -> None:
    """Its layers cannot be trained: a head that starts as a copy of them would stay as it is."""

    class PackedLinear(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.scales = mx.zeros((8, 4), dtype=mx.uint32), mx.ones((8,))

    model = model_of("llama")
    model.model.layers[-1].mlp.gate_proj = PackedLinear()
    with pytest.raises(MTPError, match="copy of layers with PackedLinear, .* seam 'linear'"):
        block_like(model.model)


def test_another_quantisation_is_not_replaced_unasked(tmp_path: Path) -> None:
    train(tmp_path / "a", store="8bit")
    path, config = tmp_path / "a" / "mtp.safetensors", tmp_path / "a" / "mtp_config.json"
    heads, _ = load_folder(tmp_path / "a", model_of())
    dequantise(heads)
    nn.quantize(heads, 32, 4, class_predicate=lambda _, layer: isinstance(layer, nn.Linear))
    mx.save_safetensors(str(path), dict(tree_flatten(heads.parameters())))
    raw = json.loads(config.read_text())
    raw["heads"]["quantization"] = {"group_size": 32, "bits": 4}
    config.write_text(json.dumps(raw))
    with pytest.raises(
        MTPError, match="has heads in 4 bits, in groups of 32, which are not written: set `store`"
    ):
        train(tmp_path / "b", start_from=tmp_path / "a", draft_vocab=0)
    train(tmp_path / "c", start_from=tmp_path / "a", draft_vocab=0, store="8bit")
    assert is_quantised(load_folder(tmp_path / "c", model_of())[0])


@pytest.mark.parametrize("bits", [4, 8])
def test_heads_for_a_quantised_mixture_of_experts_can_be_trained(tmp_path: Path, bits: int) -> None:
    """Its last layer, which new heads copy, has quantised experts."""
    model = tiny_model("qwen3_moe", seed=3, **WIDE, moe_intermediate_size=64)
    nn.quantize(model, group_size=64, bits=bits)
    trainer = train(tmp_path / "a", model=model)
    assert not is_quantised(trainer.method.heads)
    assert read_header(tmp_path / "a").training["base_precision"] == f"{bits}-bit"


def test_auto_chooses_by_acceptance_and_says_so(tmp_path: Path) -> None:
    heads, told = random_heads(model_of(), 2), []

    def choose(found: list[float], acceptance: list[float], store: str = "auto") -> tuple[bool, list[float]]:
        told.clear()
        kept, measured = as_stored(heads, store, acceptance, lambda _: found, told.append)
        return is_quantised(kept), measured

    assert choose([0.497, 0.4], [0.5, 0.4]) == (True, [0.497, 0.4]) and "stored in 8 bits" in told[0]
    assert choose([0.6, 0.39], [0.5, 0.4]) == (False, [0.5, 0.4])
    assert told == ["weights are stored in bf16: in 8 bits acceptance is 0.600 0.390, not 0.500 0.400"]
    assert choose([], []) == (False, []) and "no held-out text" in told[0]
    assert choose([0.1, 0.1], [0.5, 0.4], "8bit") == (True, [0.1, 0.1])
    assert choose([0.1], [0.5], "bf16") == (False, [0.5]) and not told
    listener = Remembering()
    trainer = train(tmp_path / "a", listener=listener, store="auto")
    (line,) = [message for message in listener.messages if message.startswith("weights are stored")]
    header = read_header(tmp_path / "a")
    assert ("in 8 bits:" in line) == ("quantization" in header.own["heads"])
    assert trainer.attached.speculator is trainer.method.heads and not is_quantised(trainer.method.heads)
    assert header.acceptance == header.acceptance_by_precision["float32"]


def test_widths_that_cannot_be_quantised_are_refused(tmp_path: Path) -> None:
    with pytest.raises(MTPError, match="needs layers whose width is a multiple of 64"):
        in_8_bits(
            random_heads(tiny_model("qwen3", seed=3, hidden_size=40, intermediate_size=80, head_dim=10), 1)
        )


def test_the_speculators_layout_has_no_place_for_them(tmp_path: Path) -> None:
    train(tmp_path / "a", store="8bit")
    with pytest.raises(MTPError, match="stored in 8 bits, for which this layout has no place"):
        export_speculators(tmp_path / "a", tmp_path / "out")


def test_values_are_those_of_mlx_lm(tmp_path: Path) -> None:
    heads = random_heads(model_of(), 1)
    weight = heads.heads[0].fuse.weight.astype(mx.bfloat16)
    packed, *scales = mx.quantize(weight, 64, 8)
    expected = mx.dequantize(packed, *[value.astype(mx.float32) for value in scales], 64, 8)
    small = in_8_bits(heads)
    dequantise(small)
    np.testing.assert_allclose(np.array(small.heads[0].fuse.weight), np.array(expected), rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    "damage", [{"bits": 8}, {"bits": "8", "group_size": 64}, {"bits": 7, "group_size": 64}], ids=str
)
def test_a_damaged_quantisation_is_one_sentence(tmp_path: Path, damage: dict[str, Any]) -> None:
    train(tmp_path / "a", store="8bit")
    path = tmp_path / "a" / "mtp_config.json"
    raw = json.loads(path.read_text())
    raw["heads"]["quantization"] = damage
    path.write_text(json.dumps(raw))
    with pytest.raises(MTPError, match="is damaged") as error:
        load_folder(tmp_path / "a", model_of())
    assert "\n" not in str(error.value)
