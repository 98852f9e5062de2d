"""Embeddings of uniforms against their definitions in plain Python, and the vector of a slot that carries nothing."""

from __future__ import annotations

import struct
from collections.abc import Callable

import mlx.core as mx
import numpy as np
import pytest

from mtp_mlx.drafters.ptp.uniform_embedding import NOTHING, UNIFORM_EMBEDDINGS, Start, uniform_embedding

WIDTH = 5
UNIFORMS = [0.0, 2.0**-24, 0.25, 0.3217, 0.41421, 0.5, 0.618034, 0.73113, 0.912346, 1 - 2.0**-24]


def on_grid(uniform: float) -> float:
    """The multiple of 2^-24 below, which is what decoding draws; a float32 holds it exactly."""
    return int(uniform * 2**24) / 2**24


def fixed_point(uniform: float) -> list[float]:
    """Bit k stands for 2^-(k + 1) and weighs half as much variance as the one before."""
    out = []
    for k in range(24):
        uniform *= 2
        bit, uniform = int(uniform), uniform % 1
        out.append(bit * 2 ** (-k / 2))
    return out


def ieee(uniform: float) -> list[float]:
    (whole,) = struct.unpack(">I", struct.pack(">f", uniform))
    return [float(digit) for digit in f"{whole:032b}"]


def sawtooth(uniform: float) -> list[float]:
    return [uniform % (1 / m) for m in range(1, 33)]


FEATURES: dict[str, Callable[[float], list[float]]] = {
    "bits": fixed_point,
    "ieee-bits": ieee,
    "sawtooth": sawtooth,
}


@pytest.mark.parametrize("name", list(FEATURES))
def test_linear_features(name: str) -> None:
    mx.random.seed(1)
    embedding = uniform_embedding(name, Start(mx.random.normal((WIDTH,)), 0.7))  # type: ignore[arg-type]
    uniforms = [on_grid(u) for u in UNIFORMS]
    weight = np.array(embedding.weight).astype(np.float64)
    expected = [weight @ FEATURES[name](u) + np.array(embedding.bias) for u in uniforms]
    found = np.array(embedding(mx.array(uniforms)))
    periodic = 2e-5 if name == "sawtooth" else 1e-6  # u near a multiple of 1/m falls on either side of a jump
    far = [all(abs(u * m - round(u * m)) > 1e-6 or u == 0 for m in range(1, 33)) for u in uniforms]
    keep = np.array(far) if name == "sawtooth" else np.ones(len(uniforms), dtype=bool)
    assert keep.sum() > 4
    np.testing.assert_allclose(found[keep], np.array(expected)[keep], rtol=1e-5, atol=periodic)


@pytest.mark.parametrize("knots", [1, 2, 3, 7])
def test_linear_interpolation(knots: int) -> None:
    mx.random.seed(2)
    embedding = uniform_embedding("linear-interpolation", Start(mx.random.normal((WIDTH,)), 0.7), knots)
    table = np.array(embedding.weight).astype(np.float64)
    expected = []
    for u in UNIFORMS:
        place = u * (knots - 1)
        left = min(int(place), max(knots - 2, 0))
        right = min(left + 1, knots - 1)
        expected.append(table[left] + (place - left) * (table[right] - table[left]))
    np.testing.assert_allclose(np.array(embedding(mx.array(UNIFORMS))), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", UNIFORM_EMBEDDINGS)
def test_a_slot_that_carries_nothing(name: str) -> None:
    """Its vector does not depend on the others of the batch, and differs from that of u = 0."""
    mx.random.seed(3)
    embedding = uniform_embedding(name, Start(mx.zeros((WIDTH,)), 0.7))
    found = embedding(mx.array([[0.3, NOTHING], [NOTHING, 0.0]]))
    assert found.shape == (2, 2, WIDTH)
    assert mx.array_equal(found[0, 1], embedding.none) and mx.array_equal(found[1, 0], embedding.none)
    assert not mx.allclose(found[1, 1], embedding.none)


@pytest.mark.parametrize("name", UNIFORM_EMBEDDINGS)
def test_starts_at_the_scale_of_the_token_table(name: str) -> None:
    """Embeddings of even uniforms differ about as much as the model's own token embeddings do."""
    mx.random.seed(4)
    start = Start(mx.random.normal((256,)), 0.3)
    found = np.array(uniform_embedding(name, start)(mx.random.uniform(shape=(500,))))
    assert 0.12 < found.std(axis=0).mean() < 0.45
    assert np.abs(found.mean(axis=0) - np.array(start.mean)).mean() < 0.6
