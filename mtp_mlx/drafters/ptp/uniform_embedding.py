"""Embeddings of a uniform random number u in [0, 1), the input of an auxiliary slot (arXiv 2512.21323).

    bits                  24 fixed-point bits of u, most significant first -> linear layer. u is a multiple of 2^-24,
                          so nothing is lost, and each bit has a meaning of its own (the default here)
    linear-interpolation  between n learnt vectors at u (n - 1); n = 3 is the default of the paper's code
    sawtooth              u mod 1/m for m = 1..32 -> linear layer
    ieee-bits             the 32 bits of u as a float32, most significant first -> linear layer (the code's "binary")

Each has one more vector, `none`, for a slot without a uniform, which is written as u < 0. It is used in greedy
decoding, where uniforms have no effect, and for the ablation of independent slots.

Legend: D hidden size, F features.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

import mlx.core as mx
import mlx.nn as nn

from mtp_mlx.model.rows import RowContext

UniformEmbeddingName = Literal["bits", "linear-interpolation", "sawtooth", "ieee-bits"]
UNIFORM_EMBEDDINGS: tuple[UniformEmbeddingName, ...] = get_args(UniformEmbeddingName)
FIXED_POINT_BITS = 24  # the precision of `position_uniforms`
IEEE_BITS = 32
TEETH = 32
NOTHING = -1.0  # stands for no uniform


@dataclass(frozen=True)
class Start:
    """Initial values of an untrained embedding, taken from the model's own token embeddings.

    Attributes:
        mean: [D] float32, their mean.
        scale: their standard deviation; the embeddings of different uniforms differ about as much.
    """

    mean: mx.array
    scale: float = 0.02


class UniformEmbedding(nn.Module):
    """An embedding of uniforms: u -> [D]."""

    def __init__(self, start: Start) -> None:
        super().__init__()
        self.none = start.mean + 0.02 * mx.random.normal(start.mean.shape)  # [D]

    def __call__(self, uniforms: mx.array) -> mx.array:
        """[...] float32 -> [..., D]; negative values give `none`."""
        carried = self.carried(mx.maximum(uniforms, 0.0))
        return mx.where(uniforms[..., None] < 0, self.none, carried)

    @abstractmethod
    def carried(self, uniforms: mx.array) -> mx.array:
        """[...] float32 in [0, 1) -> [..., D]."""


class LinearFeatures(UniformEmbedding):
    """A linear layer over features of u: `bits`, `sawtooth` and `ieee-bits`.

    Args:
        count: F.
        variance: total variance of the features if u is uniform.
    """

    def __init__(self, start: Start, count: int, variance: float) -> None:
        super().__init__(start)
        spread = start.scale / math.sqrt(variance)
        self.weight = spread * mx.random.normal((start.mean.shape[0], count))  # [D, F]
        self.bias = start.mean

    def carried(self, uniforms: mx.array) -> mx.array:
        """See `UniformEmbedding`."""
        features = self.features(uniforms).astype(self.weight.dtype)
        return features @ self.weight.T + self.bias

    @abstractmethod
    def features(self, uniforms: mx.array) -> mx.array:
        """[...] float32 in [0, 1) -> [..., F]."""


class FixedPointBits(LinearFeatures):
    """`bits`. Each bit has half the variance of the one before, since low bits are mere noise for most tokens.

    The features are scaled, not the initial weights, so that Adam's steps, equal for all weights, preserve this.
    """

    def __init__(self, start: Start) -> None:
        super().__init__(
            start, FIXED_POINT_BITS, variance=0.5
        )  # that of one bit is 1/4: 1/4 + 1/8 + 1/16 + ...

    def features(self, uniforms: mx.array) -> mx.array:
        """[..., 24]: bit k (from 0, the most significant) is 0 or 2^(-k / 2)."""
        whole = (uniforms * 2.0**FIXED_POINT_BITS).astype(mx.uint32)
        bits = (whole[..., None] >> mx.arange(FIXED_POINT_BITS - 1, -1, -1, dtype=mx.uint32)) & 1
        return bits.astype(mx.float32) * 2.0 ** (-0.5 * mx.arange(FIXED_POINT_BITS))


class IeeeBits(LinearFeatures):
    """`ieee-bits`."""

    def __init__(self, start: Start) -> None:
        super().__init__(start, IEEE_BITS, variance=IEEE_BITS / 4)

    def features(self, uniforms: mx.array) -> mx.array:
        """[..., 32] of 0 and 1."""
        whole = uniforms.astype(mx.float32).view(mx.uint32)
        return (whole[..., None] >> mx.arange(IEEE_BITS - 1, -1, -1, dtype=mx.uint32)) & 1


class Sawtooth(LinearFeatures):
    """`sawtooth`."""

    def __init__(self, start: Start) -> None:
        super().__init__(start, TEETH, variance=sum(1 / (12 * m * m) for m in range(1, TEETH + 1)))

    def features(self, uniforms: mx.array) -> mx.array:
        """[..., 32], each in [0, 1/m)."""
        period = 1.0 / mx.arange(1, TEETH + 1).astype(mx.float32)
        return mx.remainder(uniforms.astype(mx.float32)[..., None], period)


class LinearInterpolation(UniformEmbedding):
    """`linear-interpolation` between `knots` vectors."""

    def __init__(self, start: Start, knots: int = 3) -> None:
        super().__init__(start)
        self.weight = start.mean + start.scale * mx.random.normal((knots, start.mean.shape[0]))  # [n, D]

    def carried(self, uniforms: mx.array) -> mx.array:
        """See `UniformEmbedding`."""
        knots = self.weight.shape[0]
        place = uniforms.astype(mx.float32) * (knots - 1)
        left = mx.minimum(mx.floor(place), max(knots - 2, 0)).astype(mx.int32)
        share = (place - left.astype(mx.float32))[..., None].astype(self.weight.dtype)
        right = mx.minimum(left + 1, knots - 1)
        return (1 - share) * self.weight[left] + share * self.weight[right]


def uniform_embedding(name: UniformEmbeddingName, start: Start, knots: int = 3) -> UniformEmbedding:
    """The embedding called `name`, untrained. `knots` is the number of vectors of "linear-interpolation"."""
    if name == "linear-interpolation":
        return LinearInterpolation(start, knots)
    kinds: dict[str, Callable[[Start], UniformEmbedding]]
    kinds = {"bits": FixedPointBits, "sawtooth": Sawtooth, "ieee-bits": IeeeBits}
    return kinds[name](start)


class UniformSlotEmbedding(nn.Module):
    """The model's own embedding, extended by the embedding of uniforms for slot rows."""

    def __init__(
        self, base: nn.Module, embedding: UniformEmbedding, vocab_size: int, rows: RowContext
    ) -> None:
        super().__init__()
        self.base = base
        self.embedding = embedding
        self._vocab_size = vocab_size
        self._rows = rows

    def __call__(self, ids: mx.array) -> mx.array:
        """[B, R] int ids -> [B, R, D]; ids >= the vocabulary size are slots, the last rows of the pass.

        Raises:
            ValueError: if the pass has slot rows and no uniforms.
        """
        n_real = self._rows.n_real
        if n_real is None or n_real >= ids.shape[-1]:
            return self.base(ids)
        if self._rows.uniforms is None:
            raise ValueError("slots of Parallel Token Prediction need uniforms (`Block.uniforms`)")
        slots = self.embedding(self._rows.uniforms)  # [R - n_real, D] or [B, R - n_real, D]
        if n_real == 0:
            shape = self.base(mx.zeros((1, 1), dtype=mx.int32))
            return mx.broadcast_to(slots, (*ids.shape, slots.shape[-1])).astype(shape.dtype)
        real = self.base(ids[..., :n_real])
        slots = mx.broadcast_to(slots, (*real.shape[:-2], ids.shape[-1] - n_real, slots.shape[-1]))
        return mx.concatenate([real, slots.astype(real.dtype)], axis=-2)

    def as_linear(self, hidden: mx.array) -> mx.array:
        """The tied LM head: [..., D] -> [..., V]. Slots are never predicted."""
        return self.base.as_linear(hidden)

    @property
    def weight(self) -> mx.array:
        """The base table, [V, D] (packed if quantised)."""
        return self.base.weight
