"""Dominoes: a language whose neighbouring tokens depend strongly on each other through shared halves.

A token is a tile (left, right), id = left * HALVES + right. The left half of every tile is the right half of the one
before it, its own right half is drawn evenly. So a tile has log(HALVES) of entropy given the one before, any tile can
stand anywhere, and without the tile before nothing better than one tile in HALVES^2 can be guessed.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
from mlx.utils import tree_flatten, tree_unflatten
from mlx_lm.models import llama

from mtp_mlx.train.data import Example
from tests.tiny import tiny_config

HALVES = 4
VOCABULARY = HALVES**2
LENGTH = 16  # tokens of a text
PERPLEXITY = float(HALVES)  # of a model that knows the language


def sample(count: int, seed: int, length: int = LENGTH) -> np.ndarray:
    """[count, length] int32 texts."""
    halves = np.random.default_rng(seed).integers(0, HALVES, (count, length + 1))
    return (halves[:, :-1] * HALVES + halves[:, 1:]).astype(np.int32)


def examples(count: int, seed: int) -> list[Example]:
    """Texts as training rows; the first tile is the prompt."""
    return [Example(row.tolist(), 1) for row in sample(count, seed)]


def toy_model(seed: int = 3) -> Any:
    """An untrained model over the tiles, with mlx's own initial weights, which learn faster than `tiny_model`'s."""
    config = tiny_config("llama", vocab_size=VOCABULARY, hidden_size=64, intermediate_size=128)
    mx.random.seed(seed)
    model = llama.Model(llama.ModelArgs.from_dict(config))
    model.lm_head.weight = (
        4 * model.lm_head.weight
    )  # tiles that the language treats alike are told apart sooner
    mx.eval(model.parameters())
    return model


def train_ar(model: Any, steps: int, rate: float = 5e-3) -> None:
    """Trains `model` to predict the next token of the language."""
    optimizer = optim.AdamW(learning_rate=rate)

    def loss(tokens: mx.array) -> mx.array:
        return mx.mean(nn.losses.cross_entropy(model(tokens[:, :-1]), tokens[:, 1:]))

    step = nn.value_and_grad(model, loss)
    for number in range(steps):
        optimizer.learning_rate = rate * (1 - number / steps) + 1e-5
        _, gradients = step(mx.array(sample(32, 1000 + number)))
        optimizer.update(model, gradients)
        mx.eval(model.parameters(), optimizer.state)


@lru_cache(maxsize=1)
def _teacher_weights() -> list[tuple[str, mx.array]]:
    model = toy_model()
    train_ar(model, 100)
    return tree_flatten(model.parameters())


def teacher() -> Any:
    """A fresh copy of a model that has learnt the language."""
    model = toy_model()
    model.update(tree_unflatten(_teacher_weights()))
    return model


def perplexity(model: Any, seed: int = 5) -> float:
    """Of fresh texts, given all tokens before."""
    tokens = mx.array(sample(64, seed))
    return float(mx.exp(mx.mean(nn.losses.cross_entropy(model(tokens[:, :-1]), tokens[:, 1:]))).item())
