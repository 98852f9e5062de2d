"""A language of two-token words with shared halves: what comes second depends strongly on what came first.

Tokens 0..F-1 are first halves, tokens F..2F-1 second halves. Words follow each other at random; a first half has two
second halves that it may end in, and every second half ends two words. So a token's distribution has entropy, and a
second half cannot be guessed without its first half.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np

from mtp_mlx.train.data import Example
from tests.tiny import tiny_model

FIRST = 16
VOCABULARY = 2 * FIRST
ENDS = 2
LENGTH = 40  # tokens of a text
# log-likelihood per token of the language itself: a first half is one of FIRST, a second half one of ENDS
ENTROPY = (np.log(FIRST) + np.log(ENDS)) / 2


def endings() -> np.ndarray:
    """[FIRST, ENDS] the second halves of every first half."""
    random = np.random.default_rng(7)
    order = random.permutation(FIRST)
    return FIRST + np.stack([order, np.roll(order, 5)], axis=1)


def sample(count: int, seed: int, length: int = LENGTH) -> np.ndarray:
    """[count, length] int32 texts."""
    random = np.random.default_rng(seed)
    first = random.integers(0, FIRST, (count, length // 2))
    second = endings()[first, random.integers(0, ENDS, first.shape)]
    return np.stack([first, second], axis=-1).reshape(count, -1).astype(np.int32)


def examples(count: int, seed: int) -> list[Example]:
    """Texts as training rows; the first word is the prompt."""
    return [Example(row.tolist(), 2) for row in sample(count, seed)]


def toy_model(seed: int = 3) -> Any:
    """An untrained model over the language's vocabulary."""
    return tiny_model("llama", seed=seed, vocab_size=VOCABULARY, hidden_size=64, intermediate_size=128)


@lru_cache(maxsize=1)
def teacher_weights(steps: int = 220) -> list[tuple[str, mx.array]]:
    """Weights of a `toy_model` trained to predict the next token of the language, near its entropy."""
    from mlx.utils import tree_flatten

    model = toy_model()
    optimizer = optim.AdamW(learning_rate=3e-3)

    def loss(tokens: mx.array) -> mx.array:
        return mx.mean(nn.losses.cross_entropy(model(tokens[:, :-1]), tokens[:, 1:]))

    step = nn.value_and_grad(model, loss)
    for number in range(steps):
        optimizer.learning_rate = 3e-3 * (1 - number / steps) + 1e-4
        _, gradients = step(mx.array(sample(24, 1000 + number)))
        optimizer.update(model, gradients)
        mx.eval(model.parameters(), optimizer.state)
    return tree_flatten(model.parameters())


def teacher() -> Any:
    """A fresh copy of the trained model."""
    from mlx.utils import tree_unflatten

    model = toy_model()
    model.update(tree_unflatten(teacher_weights()))
    return model


def perplexity(model: Any, seed: int = 5) -> float:
    """Of the second words on in fresh texts, given all tokens before."""
    tokens = mx.array(sample(64, seed))
    losses = nn.losses.cross_entropy(model(tokens[:, :-1]), tokens[:, 1:])
    return float(mx.exp(mx.mean(losses[:, 1:])).item())
