"""Certificates: equal texts need none, a planted difference is refused, a true near-tie is certified."""

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.generate import generate_step

from mtp_mlx.measure.certificate import TIE_BOUNDS, compare
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


def test_a_tie_within_rounding_is_certified(model, reference) -> None:
    logits = np.array(model(mx.array([[*PROMPT, *reference[:4]]]))[0, -1])
    best, second = (int(i) for i in np.argsort(logits)[::-1][:2])

    def tied(ids: mx.array, cache: object = None) -> mx.array:
        out = model(ids, cache=cache)
        shift = float(logits[best] - logits[second]) - 1e-5
        return out.at[..., second].add(shift)

    tied.layers, tied.make_cache = model.layers, lambda: [None] * len(model.layers)  # type: ignore[attr-defined]
    comparison = compare(tied, PROMPT, reference, [*reference[:4], second])  # type: ignore[arg-type]
    assert comparison.certified and comparison.gap < 1e-4


def test_a_text_that_ends_early_is_no_near_tie(model, reference) -> None:
    comparison = compare(model, PROMPT, reference, reference[:5])
    assert not comparison.identical and not comparison.certified and comparison.position == 5
