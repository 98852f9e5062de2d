"""Proves that a sample of the weights knows a base in any precision, and notices a LoRA merged into it."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_map

from mtp_mlx.drafters.masks.conf_adapt import merged
from mtp_mlx.model.attach import attach
from mtp_mlx.model.base_sample import RUN, BaseSample
from mtp_mlx.model.fingerprint import base_fingerprint, sample_base, sample_lazily
from mtp_mlx.model.precision import nearest_precision
from tests.model.naive import QUANTIZABLE, random_adapter
from tests.tiny import save_tiny, tiny_model

ARCHITECTURES = ["llama", "qwen3", "gemma2", "phi3", "olmoe"]
FORMATS: dict[str, dict[str, Any]] = {
    "float": {},
    "4 bits": {"bits": 4, "group_size": 32},
    "4 bits, groups of 64": {"bits": 4, "group_size": 64},
    "8 bits": {"bits": 8, "group_size": 32},
    "mxfp4": {"bits": 4, "group_size": 32, "mode": "mxfp4"},
    "mxfp8": {"bits": 8, "group_size": 32, "mode": "mxfp8"},
}


def build(architecture: str = "llama", **overrides: Any) -> nn.Module:
    return tiny_model(architecture, seed=3, **{**QUANTIZABLE, "intermediate_size": 128, **overrides})


def copy_of(model: nn.Module, dtype: mx.Dtype = mx.float32, **quantisation: Any) -> nn.Module:
    """The model in another precision."""
    out = copy.deepcopy(model)
    out.update(tree_map(lambda value: value.astype(dtype), out.parameters()))
    if quantisation:
        nn.quantize(out, class_predicate=lambda _, layer: isinstance(layer, nn.Linear), **quantisation)
    return out


def tuned(model: nn.Module, size: float) -> nn.Module:
    """The model with a LoRA merged into every linear layer, of `size` times the weights' norm."""
    adapter = random_adapter(model)
    weights = dict(model.model.named_modules())
    for path, low_rank in adapter.low_rank.items():
        now = mx.linalg.norm(low_rank.product()) / mx.linalg.norm(weights[path].weight)
        low_rank.up = low_rank.up * (size / now)
    out = merged(model, adapter)
    assert base_fingerprint(out) == base_fingerprint(model), "norms alone do not tell"
    return out


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_rounding_of_a_base_is_the_base(architecture: str) -> None:
    model = build(architecture)
    samples = {
        (name, str(dtype)): sample_base(copy_of(model, dtype, **how))
        for name, how in FORMATS.items()
        for dtype in (mx.float32, mx.bfloat16, mx.float16)
        if not (name.startswith("mx") and dtype == mx.float16)
    }
    for one, first in samples.items():
        for other, second in samples.items():
            assert first.against(second) == "same", (one, other)
    back = sample_base(copy_of(copy_of(model, mx.bfloat16), mx.float32))
    assert all(back.against(sample) == "same" for sample in samples.values()), "bfloat16 stored as float32"


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
@pytest.mark.parametrize("size", [0.05, 0.005])
def test_a_merged_fine_tune_is_another_model_for_sure_in_floats(dtype: mx.Dtype, size: float) -> None:
    model = build()
    own, other = sample_base(model), sample_base(copy_of(tuned(model, size), dtype))
    assert own.against(other) == other.against(own) == "differs"


@pytest.mark.parametrize("name", ["4 bits", "4 bits, groups of 64", "8 bits", "mxfp8"])
def test_a_merged_fine_tune_is_noticed_in_quantised_copies(name: str) -> None:
    model = build()
    other = sample_base(copy_of(tuned(model, 0.05), **FORMATS[name]))
    assert sample_base(model).against(other) == "may differ"
    assert sample_base(copy_of(model, **FORMATS[name])).against(other) == "may differ", "same format"


def test_weights_that_were_quantised_once_are_never_certain() -> None:
    """Dequantised or read from a GGUF file, they are floats of another precision."""
    model = build()
    for how in (FORMATS["4 bits"], FORMATS["8 bits"]):
        for dtype in (mx.float32, mx.bfloat16):
            rounded = copy_of(model, dtype)
            for _, layer in rounded.named_modules():
                if isinstance(layer, nn.Linear):
                    layer.weight = mx.dequantize(*mx.quantize(layer.weight, **how), **how)
            assert sample_base(model).against(sample_base(rounded)) == "may differ"


def test_wrappers_and_laziness_change_nothing(tmp_path: Path) -> None:
    from mlx_lm.utils import load_model

    model = build()
    own = sample_base(model)
    attach(model, random_adapter(model))
    assert sample_base(model) == own
    twice = build()
    attach(twice, random_adapter(twice), exact=True)
    assert any(name.endswith(".base.base") for name, _ in twice.named_modules()), "this proves nothing"
    assert sample_base(twice) == own
    save_tiny(tmp_path, "llama", **{**QUANTIZABLE, "intermediate_size": 128, "seed": 3})
    lazy, _ = load_model(tmp_path, lazy=True)
    assert sample_base(lazy) == own and sample_lazily(lazy) == own


def test_a_sample_comes_back_from_json_and_damage_is_an_error() -> None:
    own = sample_base(build())
    assert BaseSample.from_json(own.to_json()) == own and own.key() == sample_base(build()).key()
    assert own.key() != sample_base(tuned(build(), 0.01)).key()
    assert own.values.shape == (14, RUN) and not np.isnan(own.values).any()
    for raw in (
        {},
        {"form": "x", "weights": "!"},
        {"form": "x", "weights": "AAAA"},
        {"form": "x", "weights": 3},
    ):
        with pytest.raises((KeyError, TypeError, ValueError)):
            BaseSample.from_json(raw)


def test_samples_of_other_layers_are_never_certain_to_differ() -> None:
    """A version of mlx-lm that joins layers, or names them anew, has other rows in its sample."""
    model = build()
    own, shorter = sample_base(model), sample_base(build(num_hidden_layers=1))
    assert own.values.shape != shorter.values.shape and own.against(shorter) == "may differ"
    for index, layer in enumerate(model.model.layers):
        layer.self_attn.query = layer.self_attn.pop("q_proj")
        assert index or own.layers != sample_base(model).layers
    renamed = sample_base(model)
    assert renamed.values.shape == own.values.shape and own.against(renamed) == "may differ"
    assert BaseSample.from_json(renamed.to_json()).layers == renamed.layers
    raw = own.to_json()
    del raw["layers"]
    before = BaseSample.from_json(raw)
    assert before.against(own) == "same" and before.against(sample_base(tuned(build(), 0.05))) == "differs"


def test_precisions_have_names_and_neighbours() -> None:
    model = build()
    assert attach(copy_of(model, mx.bfloat16)).precision == "bfloat16"
    assert attach(copy_of(model, **FORMATS["4 bits"])).precision == "4-bit"
    assert attach(copy_of(model, **FORMATS["mxfp4"])).precision == "mxfp4"
    nn.quantize(model.model.layers[0], group_size=32, bits=8)
    nn.quantize(model.model.layers[1], group_size=32, bits=4)
    assert attach(model).precision == "mixed: 4-bit, 8-bit (6.0 bits a weight)"
    known = ["float32", "4-bit"]
    assert nearest_precision(known, "4-bit") == nearest_precision(known, "mxfp4") == "4-bit"
    assert nearest_precision(known, "bfloat16") == "float32" and nearest_precision([], "4-bit") is None
    assert nearest_precision(["3-bit", "8-bit"], "mixed: 4-bit, 8-bit") == "8-bit"


def test_a_mixed_precision_is_the_mean_over_its_weights() -> None:
    """One small layer in 8 bits does not make a 4-bit model one of 6 bits."""
    model = copy_of(build(), **FORMATS["4 bits"])
    attention = model.model.layers[0].self_attn
    attention.k_proj = nn.QuantizedLinear(64, 32, bias=False, group_size=32, bits=8)
    small, total = 64 * 32, sum(layer.size for layer in _linear_weights(build()))
    mean = 4 + 4 * small / total
    name = attach(model).precision
    assert name == f"mixed: 4-bit, 8-bit ({mean:.1f} bits a weight)"
    assert nearest_precision(["6-bit", "4-bit"], name) == "4-bit"
    assert nearest_precision(["4-bit", "mixed: 4-bit, 8-bit (7.6 bits a weight)"], "8-bit").startswith(
        "mixed"
    )


def _linear_weights(model: nn.Module) -> list[mx.array]:
    return [
        layer.weight for _, layer in model.model.layers[0].named_modules() if isinstance(layer, nn.Linear)
    ] * 2
