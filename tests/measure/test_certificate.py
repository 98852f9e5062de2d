"""Certificates: equal texts need none, a planted difference is refused, a true near-tie is certified; how near is
measured on the model."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx_lm.generate import generate_step
from mlx_lm.models.cache import make_prompt_cache

from mtp_mlx.measure.certificate import TIE_BOUNDS, coarsest, compare, measure_rounding
from tests.tiny import tiny_model

PROMPT = [5, 9, 14, 3]


@pytest.fixture(scope="module")
def model():
    return tiny_model("llama", seed=3)


@pytest.fixture(scope="module")
def reference(model) -> list[int]:
    return [int(token) for token, _ in generate_step(mx.array(PROMPT), model, max_tokens=12)]


def test_the_same_text_needs_no_certificate(model, reference) -> None:
    comparison = compare(model, PROMPT, reference, list(reference))
    assert comparison.identical and not comparison.certified


def test_another_token_is_located_and_refused(model, reference) -> None:
    logits = np.array(model(mx.array([[*PROMPT, *reference[:4]]]))[0, -1])
    other = int(np.argsort(logits)[-3])
    comparison = compare(model, PROMPT, reference, [*reference[:4], other, 1, 1])
    assert (comparison.position, comparison.reference_token, comparison.token) == (4, reference[4], other)
    assert comparison.gap == pytest.approx(logits[reference[4]] - logits[other], abs=1e-4)
    assert comparison.gap > TIE_BOUNDS[mx.float32] and not comparison.certified


class Tied(nn.Module):
    """A model whose logit of one token is shifted."""

    def __init__(self, model: Any, token: int, shift: float) -> None:
        super().__init__()
        self.model, self._token, self._shift = model, token, shift

    @property
    def layers(self) -> list[nn.Module]:
        return self.model.layers

    def make_cache(self) -> list[Any]:
        return make_prompt_cache(self.model)

    def __call__(self, ids: mx.array, cache: Any = None) -> mx.array:
        return self.model(ids, cache=cache).at[..., self._token].add(self._shift)


def test_a_tie_within_rounding_is_certified(model, reference) -> None:
    logits = np.array(model(mx.array([[*PROMPT, *reference[:4]]]))[0, -1])
    best, second = (int(i) for i in np.argsort(logits)[::-1][:2])
    tied = Tied(model, second, float(logits[best] - logits[second]) - 1e-5)
    comparison = compare(tied, PROMPT, reference, [*reference[:4], second])
    assert comparison.certified and comparison.gap < 1e-4


def mamba(dtype: mx.Dtype) -> Any:
    """A tiny model of Mamba-2 and attention layers; its quantised weights have scales of this precision."""
    made = tiny_model("granitemoehybrid", seed=3, hidden_size=64, intermediate_size=96)
    made.set_dtype(dtype)
    nn.quantize(
        made, 32, 8, class_predicate=lambda _, m: hasattr(m, "to_quantized") and not m.weight.shape[1] % 32
    )
    return made


@pytest.mark.parametrize(
    ("dtype", "least", "most"), [(mx.bfloat16, 0.5, 4.0), (mx.float16, 0.1, 0.8), (mx.float32, 0.0, 0.01)]
)
def test_the_bound_is_what_rounding_does_to_the_model(dtype: mx.Dtype, least: float, most: float) -> None:
    """mlx-lm's own logits move with the rows of its passes: in half precision further than in a transformer."""
    hybrid, prompt = mamba(dtype), [46]
    text = [int(token) for token, _ in generate_step(mx.array(prompt), hybrid, max_tokens=13)]
    measured = measure_rounding(hybrid, prompt, text)
    assert least < measured.bound < most
    best, second = (int(i) for i in np.argsort(np.array(measured.logits))[::-1][:2])
    apart = float((measured.logits[best] - measured.logits[second]).item())
    for share, certified in ((0.7, True), (1.5, False)):
        near = Tied(hybrid, second, apart - share * measured.bound)
        comparison = compare(near, prompt, [*text, best], [*text, second])
        assert comparison.gap == pytest.approx(share * measured.bound, rel=0.15)
        assert comparison.certified == certified, comparison


def test_a_transformer_in_bfloat16_is_not_excused_as_far() -> None:
    dense = tiny_model("llama", seed=3)
    dense.set_dtype(mx.bfloat16)
    assert measure_rounding(dense, [46], [9, 30, 7, 2]).bound == TIE_BOUNDS[mx.bfloat16]


def test_the_bound_follows_the_weights_and_not_the_logits() -> None:
    """Logits in float32 of states in bfloat16 are as coarse as these."""

    class Widened(Tied):
        def __call__(self, ids: mx.array, cache: Any = None) -> mx.array:
            return super().__call__(ids, cache).astype(mx.float32)

    half = tiny_model("llama", seed=3)
    half.set_dtype(mx.bfloat16)
    text = [int(token) for token, _ in generate_step(mx.array(PROMPT), half, max_tokens=4)]
    logits = np.array(half(mx.array([[*PROMPT, *text]]))[0, -1].astype(mx.float32))
    best, second = (int(i) for i in np.argsort(logits)[::-1][:2])
    model = Widened(half, second, float(logits[best] - logits[second]) - 0.1)
    comparison = compare(model, PROMPT, [*text, best], [*text, second])
    assert comparison.certified and comparison.bound == TIE_BOUNDS[mx.bfloat16]


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16])
@pytest.mark.parametrize("bits", [0, 4])
def test_the_coarsest_precision(bits: int, dtype: mx.Dtype) -> None:
    model = tiny_model("llama", seed=3, hidden_size=64, intermediate_size=96)
    model.set_dtype(dtype)
    if bits:
        nn.quantize(model, 32, bits)
    model.model.norm.weight = model.model.norm.weight.astype(mx.float32)
    assert coarsest(model) == dtype


def test_a_text_that_ends_early_is_no_near_tie(model, reference) -> None:
    comparison = compare(model, PROMPT, reference, reference[:5])
    assert not comparison.identical and not comparison.certified and comparison.position == 5
