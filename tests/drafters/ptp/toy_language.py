"""Two languages whose neighbouring tokens depend strongly on each other.

Dominoes share halves: a token is a tile (left, right), id = left * halves + right. The left half of every tile is the
right half of the one before it, its own right half is drawn evenly. So a tile has log(halves) of entropy given the
one before, any tile can stand anywhere, and without the tile before nothing better than one tile in halves^2 can be
guessed.

Words are two tokens: one of two first halves, then one of the two second halves that go with it. There are few texts
of a few words, so a training step can see all of them: then next-token frequencies are exact, and what is left to
chance is the uniforms of the slots.
"""

from __future__ import annotations

import itertools
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
LENGTH = 16  # tokens of a text


def sample(count: int, seed: int, length: int = LENGTH) -> np.ndarray:
    """[count, length] int32 texts of dominoes."""
    drawn = np.random.default_rng(seed).integers(0, HALVES, (count, length + 1))
    return (drawn[:, :-1] * HALVES + drawn[:, 1:]).astype(np.int32)


def texts_of_words(count: int) -> np.ndarray:
    """[4^count, 2 count] int32, every text of so many words once; ids 0 and 1 are first halves, 2 to 5 second."""
    words = [(first, 2 + 2 * first + second) for first in range(2) for second in range(2)]
    texts = [[token for word in text for token in word] for text in itertools.product(words, repeat=count)]
    return np.array(texts, dtype=np.int32)


def examples(count: int, seed: int) -> list[Example]:
    """Texts as training rows; the first tile is the prompt."""
    return [Example(row.tolist(), 1) for row in sample(count, seed)]


def toy_model(vocabulary: int = HALVES**2, seed: int = 3) -> Any:
    """An untrained model of either language; mlx's own initial weights learn faster than `tiny_model`'s."""
    config = tiny_config("llama", vocab_size=vocabulary, hidden_size=64, intermediate_size=128)
    mx.random.seed(seed)
    model = llama.Model(llama.ModelArgs.from_dict(config))
    model.lm_head.weight = (
        4 * model.lm_head.weight
    )  # tiles that the language treats alike are told apart sooner
    mx.eval(model.parameters())
    return model


def optimizer_for_toys() -> optim.AdamW:
    """The trainer's optimizer; its rate is set before every step."""
    return optim.AdamW(learning_rate=0.0, betas=[0.9, 0.99], bias_correction=True, weight_decay=0.0)


def rate_at(step: int, steps: int, peak: float, power: float = 1.0) -> float:
    """Ten steps of warm-up, then down to nothing, linearly or with a longer tail."""
    return peak * min(1.0, (step + 1) / 10) * (1 - step / steps) ** power


def train_ar(model: Any, steps: int, texts: np.ndarray | None = None) -> None:
    """Trains `model` to predict the next token of dominoes, or of `texts` [B, T], all of them in every step."""
    optimizer = optimizer_for_toys()

    def loss(tokens: mx.array) -> mx.array:
        return mx.mean(nn.losses.cross_entropy(model(tokens[:, :-1]), tokens[:, 1:]))

    step = nn.value_and_grad(model, loss)
    for number in range(steps):
        optimizer.learning_rate = rate_at(number, steps, 5e-3)
        _, gradients = step(mx.array(sample(32, 1000 + number) if texts is None else texts))
        optimizer.update(model, gradients)
        mx.eval(model.parameters(), optimizer.state)


class Average:
    """The mean of a module's parameters over the last steps of a training."""

    def __init__(self, module: nn.Module) -> None:
        self._module, self._count = module, 0
        self._mean: dict[str, mx.array] = {}

    def add(self) -> None:
        """The parameters as they are now."""
        self._count += 1
        for name, value in tree_flatten(self._module.parameters()):
            before = self._mean.get(name, value)
            self._mean[name] = before + (value - before) / self._count
        mx.eval(self._mean)

    def put(self) -> None:
        """Sets the module's parameters to it."""
        self._module.update(tree_unflatten(list(self._mean.items())))


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


def perplexity(model: Any, tokens: np.ndarray) -> float:
    """Of texts [B, T], each token given all before it."""
    ids = mx.array(tokens)
    return float(mx.exp(mx.mean(nn.losses.cross_entropy(model(ids[:, :-1]), ids[:, 1:]))).item())
